"""Which tests are slow: more than about a second on a quiet core. `pytest -m "not slow"` leaves them out."""

# begin first: a worker that began one of these at the end would work alone
LONGEST = (
    "kernels/test_kernel_interpreter.py",
    "test_elastic.py",
    "test_end_to_end.py",
    "test_pretrain.py",
)
# files, and single tests of others with all their parameters, below tests/
SLOW = (
    "convert/test_export.py::test_export_goes_without_a_tokenizer_that_is_gone",
    "convert/test_export.py::test_export_needs_nothing_else",
    "convert/test_official.py::test_features_and_losses_are_the_official_ones",
    "convert/test_official.py::test_fine_tuned_classifier_gives_its_encoder",
    "convert/test_official.py::test_published_size_has_its_heads_whatever_the_flag_says",
    "convert/test_onnx.py",
    "convert/test_start.py::test_converted_mae_trains_on_with_its_positions",
    "convert/test_start.py::test_run_starts_where_another_ended",
    "data/test_cli.py::test_mistakes_give_one_line",
    "data/test_fetcher.py",
    "data/test_object_store.py",
    "data/test_range.py::test_features_and_transfer_use_it",
    "kernels/test_kernel_aot.py::test_command",
    "kernels/test_kernel_aot.py::test_small_gpus_have_room",
    "kernels/test_kernel_aot.py::test_unsound_settings_are_reported",
    "kernels/test_kernel_docs.py::test_triton_is_not_needed_on_a_cpu",
    "kernels/test_kernel_fsdp.py::test_sharded_modules_equal_one_process",
    "kernels/test_kernel_hub.py::test_it_lives_beside_the_installed_package",
    "kernels/test_kernel_hub.py::test_it_loads_from_a_path_alone",
    "kernels/test_kernel_interpreter.py",
    "kernels/test_kernel_memory.py",
    "kernels/test_kernel_ops.py::test_error_is_at_most_twice_that_of_torch",
    "kernels/test_kernel_ops.py::test_inductor_equals_eager",
    "test_attention.py::test_op_is_a_good_citizen",
    "test_attention.py::test_the_fastest_is_taken_and_the_others_reasons_are_told",
    "test_attention.py::test_times_are_measured",
    "test_bands.py::test_exports_give_the_features_of_encode",
    "test_bands.py::test_the_satellite_example_runs",
    "test_beside_training.py::test_a_save_that_fails_in_the_background_stops_the_run",
    "test_config.py::test_damaged_checkpoint",
    "test_config.py::test_dry_run_fails_on_what_a_start_would_fail_on",
    "test_config.py::test_loss_that_is_not_finite",
    "test_config.py::test_old_run_is_not_overwritten",
    "test_config.py::test_ranks_that_do_not_come_are_missed",
    "test_config.py::test_repeats_lengthen_an_epoch",
    "test_config.py::test_resuming_a_finished_run_says_so",
    "test_config.py::test_weights_that_are_not_finite_are_not_saved",
    "test_cpu_attention.py::test_a_damaged_library_is_built_again",
    "test_diagnosis.py::test_a_broken_run_is_named",
    "test_diagnosis.py::test_a_run_that_waits_for_its_data_is_named_and_a_sound_one_is_not",
    "test_elastic.py",
    "test_ema.py::test_a_resumed_run_has_the_same_average",
    "test_ema.py::test_it_may_begin_later_and_goes_on_after_a_resume",
    "test_ema.py::test_what_leaves_the_run_is_the_average",
    "test_ema.py::test_zero_shards_it_and_a_checkpoint_has_it_whole",
    "test_end_to_end.py",
    "test_engine_parity.py",
    "test_engine_waits.py",
    "test_faults.py",
    "test_feature_map.py::test_a_picture_is_as_wide_as_its_panels",
    "test_feature_map.py::test_runs_are_drawn_beside_each_other",
    "test_helpers.py::test_a_rank_that_hangs_is_shown_with_where_it_waits",
    "test_hostile_files.py",
    "test_hub_answers.py::test_silence_is_not_waited_for_again",
    "test_memory.py::test_too_little_memory_to_import_torch_is_one_line",
    "test_model.py::test_every_gradient_in_bf16_is_near_that_in_float32",
    "test_native_programs.py::test_a_dry_run_takes_the_sizes_that_stats_wrote",
    "test_native_programs.py::test_a_run_is_the_same_resumed_and_on_two_ranks",
    "test_native_programs.py::test_pictures_keep_the_aspect_ratio",
    "test_native_programs.py::test_tasks_take_them",
    "test_own_data.py",
    "test_parts.py::test_a_rank_that_is_killed_in_the_midst_of_a_save_leaves_the_one_before",
    "test_parts.py::test_what_four_ranks_save_any_number_loads_in_any_stage_bit_for_bit",
    "test_parts.py::test_what_one_rank_saved_several_load",
    "test_model.py::test_a_function_of_the_representation_compiles",
    "test_pretrain.py::test_an_impossible_override_is_told_before_anything_is_made",
    "test_pretrain.py::test_one_line_of_an_installed_wheel_makes_a_report",
    "test_pretrain.py::test_stopped_in_any_stage_the_same_line_goes_on",
    "test_ranks.py",
    "test_resume.py",
    "test_run_log.py::test_a_folder_that_is_renamed_under_way_is_told_with_what_to_do",
    "test_run_log.py::test_a_run_outlives_the_reader_of_its_output",
    "test_run_log.py::test_loggers_get_the_pictures_of_the_report",
    "test_run_log.py::test_wandb_offline_and_again_after_a_resume",
    "test_run_log.py::test_wandb_without_an_account_is_one_line",
    "test_speed.py::test_compiled_blocks_are_right_and_compile_once",
    "test_speed.py::test_repeating_shapes_change_no_result",
    "test_status.py::test_a_training_run_keeps_its_record",
    "test_stop_and_stall.py",
    "test_training_loop.py",
    "test_verify.py",
    "test_visualise.py::test_attention_maps_are_the_ops_weights",
    "test_vqgan.py",
    "transfer/test_attentive.py::test_it_finds_the_token_that_tells_where_the_mean_does_not",
    "transfer/test_baselines.py::test_colours_are_named_by_pixels",
    "transfer/test_baselines.py::test_every_result_says_the_share_of_the_largest_class",
    "transfer/test_compare.py",
    "transfer/test_curve.py",
    "transfer/test_figures.py",
    "transfer/test_finetune.py",
    "transfer/test_knn.py::test_a_result_is_never_written_over",
    "transfer/test_knn.py::test_colours_are_told_apart",
    "transfer/test_linear.py",
    "transfer/test_modes.py",
    "transfer/test_ood.py",
    "transfer/test_predictions.py",
    "transfer/test_results.py",
    "transfer/test_retrieval.py",
    "transfer/test_robustness.py",
    "transfer/test_survey.py",
)


def _parts(name: str) -> tuple[str, str]:
    file, _, test = name.removeprefix("tests/").partition("::")
    return file, test


def rank(name: str) -> int:
    """Return where a test's file is among those that begin first, which are the longest. `name`: as in `is_slow`."""
    file, _ = _parts(name)
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def is_slow(name: str) -> bool:
    """Return whether a test is slow. `name`: its node id, tests/FILE.py::TEST[PARAMETERS]."""
    file, test = _parts(name)
    return file in SLOW or f"{file}::{test.partition('[')[0]}" in SLOW
