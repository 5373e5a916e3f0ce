"""If a user makes a mistake, the program prints one line that names the mistake, writes no files, and exits with code
2."""

import json
import re
import runpy
import subprocess
import sys
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from m3ae_fast import train
from m3ae_fast.__main__ import MODULES
from m3ae_fast.base import hardware
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.config import Config, DeepSpeedConfig, ModelConfig, OptimConfig, TrainConfig, follow, load_config, parse
from m3ae_fast.config.recipes import with_recipe
from m3ae_fast.data import ShardStore, Share, open_corpus, open_data, split_batch
from m3ae_fast.data.manifest import KINDS, rows_of, write
from m3ae_fast.engine.memory_estimate import zero_bytes
from m3ae_fast.engine.muon import orthogonalisation_flops
from m3ae_fast.engine.optimizer import ADAM_EPS
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process import ranks
from m3ae_fast.training.dry_run import (
    fetching_lines,
    memory_table,
    network_bytes,
    report,
    report_time,
    shortest_steps,
)
from m3ae_fast.training.throughput_estimate import ThroughputEstimate
from tests.helpers.labelled import labelled_tar
from tests.helpers.ranks import free_port
from tests.helpers.trainer import CLIPART, ROOT, TINY


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Return a function that runs train.py's main in this process with the tiny config. The function returns the exit
    code and the text of stderr or, with `out`, of stdout."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # so that pytest's handler of Ctrl-C is not replaced
    monkeypatch.setattr("m3ae_fast.training.dry_run.MEASURED_S", 0.1)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))

    def call(*options: str, file=config, out=False) -> tuple[int, str]:
        options = ("--set", f"run.dir={tmp_path / 'run'}", *options)
        try:
            code = exit_cleanly(lambda: train.main(["--config", str(file), *options]))
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out if out else printed.err

    call.folder = tmp_path
    return call


MISTAKES = [
    (["optim.peek_lr=1"], "unknown key optim.peek_lr; did you mean optim.peak_lr?"),
    (["modell={}"], "unknown key modell; did you mean model?"),
    (["modell.depth=3"], "unknown key modell; did you mean model?"),
    (["finetune.epochs=3"], "unknown key finetune.epochs; did you mean train.epochs?"),
    (["optim.epochs=3"], "unknown key optim.epochs; did you mean train.epochs?"),
    (["train.peak_lr=1"], "unknown key train.peak_lr; did you mean optim.peak_lr?"),
    (["data.train.0.shard=x"], "unknown key data.train.0.shard; did you mean data.train.0.shards?"),
    (["data.train.0.shards=5"], "data.train.0.shards: input should be a valid string or a valid array (got 5)"),
    (["train.steps=many"], "train.steps: input should be a valid integer"),
    (["train.steps=1.5"], "train.steps: input should be a valid integer"),
    (["train.steps=null"], "set the length of the run"),
    (["optim.betas=[0.9]"], "optim.betas"),
    (["model.size=giant"], "model.size"),
    (["model.emb_dim=33"], "emb_dim 33 is not divisible by num_heads 4"),
    (["model.image_size=30"], "image_size 30 is not divisible by patch_size 8"),
    (["model.channels=1"], "image_mean has 3 values for 1 channel"),
    (["masking.image_ratio=1.5"], "masking.image_ratio"),
    (["data.crop_scale=[0.9,0.1]"], "crop_scale"),
    (["data.train=[]"], "data.train"),
    (["data.train.0.shards=/nowhere/x.tar"], "/nowhere/x.tar"),
    (["data.tokenizer=/nowhere/tokenizer.json"], "/nowhere/tokenizer.json"),
    (["data.tokenizer=null"], "data.tokenizer"),
    (["model.vocab_size=100"], "set model.vocab_size to 2048"),
    (["deepspeed.bf16={}"], "unknown key deepspeed.bf16"),
    (["deepspeed.zero_optimization.stage=4"], "input should be less than or equal to 3"),
    (["deepspeed.zero_optimization.stage=true"], "input should be a valid integer"),
    (["deepspeed.zero_optimization.offload_optimizer=cpu"], "zero_optimization.offload_optimizer"),
    (["deepspeed.zero_optimization.overlap_comm=true"], "unknown key deepspeed.zero_optimization.overlap_comm"),
    (["deepspeed.zero_optimization.reduce_bucket=5"], "did you mean deepspeed.zero_optimization.reduce_bucket_size?"),
    (["deepspeed.zero_optimisation.stage=1"], "did you mean deepspeed.zero_optimization?"),
    (["deepspeed.sequence_parallel_size=2"], "unknown key deepspeed.sequence_parallel_size"),
    (["deepspeed.zero_optimization.offload_param.device=cpu"], "offload_param needs stage 3"),
    (["optim.peak_lr=NaN"], "optim.peak_lr: input should be a finite number"),
    (["optim.betas=[2,2]"], "optim.betas.0: input should be less than 1"),
    (["run.seed=18446744073709551616"], "run.seed"),
    (["run.dir="], "run.dir: is empty; specify a path"),
    (["model.depth=100000000000"], "model.depth"),
    (["model.mlp_ratio=0.01"], "mlp_ratio 0.01 gives a hidden width of 0"),
    (["train.global_batch=1000000000000000000"], "train.global_batch"),
    (['run.dir="a\\u0000b"'], "null character"),
    (["data.train.².shards=x"], "'²'"),
    (["nonsense"], "section.key=value"),
    (["train.steps.x=1"], "train.steps is a value"),
    (["data.train.1.shards=x"], "'1'"),  # there is only one source
]


def test_a_shipped_config_can_be_named_without_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("large") == load_config(ROOT / "configs/large.json")
    with pytest.raises(
        UserError, match=r"config big: is neither a file nor a config .* \(base, huge, large, quickstart, small\)"
    ):
        load_config("big")
    (tmp_path / "large").write_text((ROOT / "configs/small.json").read_text())  # a path takes precedence
    assert load_config("large") == load_config(ROOT / "configs/small.json")


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_user_errors_are_reported(run, overrides, message):
    if overrides == ["data.tokenizer=null"]:
        message = "data.tokenizer: no tokenizer is set"
    if overrides[0].startswith("deepspeed."):
        overrides = ["deepspeed={}", *overrides]
    code, err = run(*(word for o in overrides for word in ("--set", o)))
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in err
    assert not (run.folder / "run").exists()


def test_invalid_config_files_are_refused(run):
    for name, text, message in [
        ("missing.json", None, "cannot be read"),
        ("broken.json", "{", "is not valid JSON"),
        ("list.json", "[]", "must contain one JSON object"),
        ("deep.json", "[" * 100_000, "is not valid JSON"),
        ("twice.json", '{"data": {"train": 1, "train": 2}}', "duplicate key 'train'"),
        ("empty.json", "{}", "data is missing"),
    ]:
        file = run.folder / name
        if text is not None:
            file.write_text(text)
        code, err = run(file=file)
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(run):
    assert run()[0] == 0
    code, err = run()
    assert code == 2 and "already contains checkpoints" in err
    code, err = run("--resume", "auto", "--set", "model.depth=3")
    assert code == 2 and "model.depth = 2, but the config has 3" in err
    code, err = run("--resume", str(run.folder / "nothing"))
    assert code == 2 and "neither a checkpoint nor a run folder" in err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused(run):
    """test_hostile_files.py tests every kind of damage."""
    assert run()[0] == 0
    for name in ("state.safetensors", "state.json"):
        (run.folder / "run/checkpoints/step-00000006" / name).write_bytes(b"{")
        code, err = run("--resume", "auto")
        assert code == 2 and f"{name} is damaged" in err


@pytest.mark.parametrize(
    ("name", "value"), [("M3AE_KERNELS_IMPL", "cuda"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "2"), ("RANK", "1")]
)
def test_invalid_environment_variables_are_refused(run, monkeypatch, name, value):
    for unset in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(unset, raising=False)
    monkeypatch.setenv(name, value)
    code, err = run()
    assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert (value if value == "cuda" else name if name in err else "MASTER_ADDR") in err


@pytest.mark.slow
def test_missing_ranks_are_reported(run, monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=1))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    code, err = run()
    assert code == 2 and "error: rank 0 of 2 cannot join the other ranks (" in err and "Traceback" not in err


def test_a_rank_that_exits_while_ranks_join_causes_no_traceback(run, monkeypatch):
    gone = RuntimeError("[pair.cc:1] Connection closed by peer [::1]")
    monkeypatch.setattr(torch.distributed, "init_process_group", Mock(side_effect=gone))
    code, err = run()
    assert (
        code == 2 and err.count("error: ") == 1 and "cannot join the other ranks ([pair.cc:1] Connection closed" in err
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 1])
def test_resuming_a_finished_run_reports_that_it_is_finished(run, steps):
    assert run("--set", "train.steps=2")[0] == 0
    code, out = run("--resume", "auto", "--set", f"train.steps={steps}", out=True)
    assert code == 0 and "training is complete" in out and "stopped" not in out


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run(run):
    options = ["optim.peak_lr=1e9", "optim.clip_grad=null", "train.steps=30", "train.save_every=1"]
    code, err = run(*(word for o in options for word in ("--set", o)))
    assert code == 2
    assert "the loss of step" in err and "train-0000.tar/" in err and "optim.peak_lr" in err
    assert (run.folder / "run/checkpoints").is_dir()  # earlier checkpoints are still there


@pytest.mark.slow
def test_non_finite_weights_are_not_saved(run):
    options = ["optim.peak_lr=1e300", "optim.clip_grad=null", "train.save_every=1"]
    code, err = run(*(word for o in options for word in ("--set", o)))
    assert code == 2 and "is not finite" in err and "optim.peak_lr" in err
    assert not list((run.folder / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wall_clock_breakdown": False}, "unknown key deepspeed.wall_clock_breakdown"),
        ({"flops_profiler": {"enabled": True}}, "unknown key deepspeed.flops_profiler"),
    ],
)
def test_invalid_deepspeed_sections_are_refused(run, section, message):
    section = {"zero_optimization": {"stage": 1}} | section
    code, err = run("--set", f"deepspeed={json.dumps(section)}")
    assert code == 2 and message in err


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("clip_grad", [None, 0.7])
def test_deepspeed_sections_avoid_synchronisation_and_sum_gradients_in_float32(stage, clip_grad):
    from m3ae_fast.engine.deepspeed_engine import deepspeed_section

    config = DeepSpeedConfig(zero_optimization={"stage": stage})
    found = {
        dtype: deepspeed_section(config, OptimConfig(clip_grad=clip_grad), dtype, Share(15, accumulation=5))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for section in found.values():
        sizes = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
        assert (*sizes, section["gradient_clipping"]) == (3, 5, clip_grad or 0)
        assert not section["timers"]["throughput"]["enabled"] and section["steps_per_print"] > 1e6
        assert section["zero_optimization"]["stage"] == stage
    plain, low = found.values()
    assert not plain.keys() & {"torch_autocast", "bf16", "data_types"}
    if stage == 0:
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        assert low["torch_autocast"] == autocast and "bf16" not in low
    else:
        assert low["bf16"] == {"enabled": True, "check_grad_overflow": False} and "torch_autocast" not in low
        assert low["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_out_of_memory_error_suggests_a_fix(run, monkeypatch):
    def too_large(*_):
        raise MemoryError

    monkeypatch.setattr("m3ae_fast.training.run.M3AE", too_large)
    code, err = run()
    assert code == 2 and err.startswith("error: out of memory: lower train.micro_batch") and err.count("\n") == 1


def test_offloading_to_the_device_none_is_no_offloading():
    nowhere = {"stage": 1, "offload_optimizer": {"device": "none"}}
    muon = ["optim.name=muon", f"deepspeed={json.dumps({'zero_optimization': nowhere})}"]
    assert not load_config(ROOT / "configs/quickstart.json", muon).zero.offloads_optimizer


def test_compile_without_a_compiler_is_refused(run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    code, err = run("--set", "train.compile=true")
    assert code == 2 and "set train.compile=false" in err


def test_an_image_only_model_refuses_sources_with_required_captions(run):
    code, err = run("--set", "model.vocab_size=0", "--set", "data.train.0.modality=paired")
    assert code == 2 and "has captions; set data.train.0.modality=image" in err
    code, err = run("--set", "model.vocab_size=0", "--set", "data.val.0.modality=any")
    assert code == 2 and "has captions; set data.val.0.modality=image" in err


def test_an_image_only_model_reads_the_images_of_captioned_shards():
    """Without a vocabulary, the config is the same as with `modality=image` on the sources of training and
    validation."""
    alone = load_config(ROOT / "configs/quickstart.json", ["model.vocab_size=0"])
    given = ["data.train.0.modality=image", "data.val.0.modality=image"]
    assert alone == load_config(ROOT / "configs/quickstart.json", ["model.vocab_size=0", *given])
    data = open_data(alone.data, alone.model)
    assert not data.train.has_captions and not data.val.has_captions and data.tokenizer is None
    assert load_config(ROOT / "configs/quickstart.json", []).data.train[0].modality == "auto"


def test_overrides_replace_defaults():
    config = load_config(
        ROOT / "configs/quickstart.json", ["optim.peak_lr=0.1", "run.dir=x y", "data.train.0.weight=2", "model.depth=7"]
    )
    assert config.optim.peak_lr == 0.1 and str(config.run.dir) == "x y"
    assert config.data.train[0].weight == 2 and config.model.depth == 7
    large = ModelConfig()
    assert (large.emb_dim, large.depth, large.num_heads, large.dec_emb_dim) == (1024, 24, 16, 512)
    wide = ModelConfig(size="small", emb_dim=768)
    assert (wide.emb_dim, wide.depth) == (768, 12)
    assert load_config(ROOT / "configs/quickstart.json", ['run={"seed":7}']).run.dir == Path("runs/m3ae")
    with pytest.raises(UserError, match="unknown key"):
        load_config(ROOT / "configs/quickstart.json", ["train.global_bach=1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_a_dry_run_prints_the_plan(path, capsys):
    """Every config is valid, and the dry run prints the known numbers."""
    assert train.main(["--config", str(path), "--dry-run", "--no-data", "--world", "8"]) == 0
    out = capsys.readouterr().out
    assert "ZeRO stage" in out
    known = {"large": ("376,155,194", "209.9 G"), "base": ("150,757,434", "102.9 G"), "small": ("74,782,266", "71.2 G")}
    for number in known.get(path.stem, ()):
        assert number in out
    recomputed = (
        "a GPU without enough memory for all activations, 62% are kept"
        if path.stem == "large"
        else "a GPU without enough memory for all activations"
    )
    assert (recomputed in out) == (path.stem not in ("huge", "quickstart"))


def test_the_peak_throughput_of_a_gpu_is_that_of_its_data_sheet():
    """A name that begins with the name of another GPU is not confused with it."""
    for name, peaks in hardware.PEAKS.items():
        assert hardware.data_sheet(f"NVIDIA {name}GB") is peaks
    assert hardware.data_sheet("NVIDIA GeForce GTX 1080") is None


def _plan(capsys, *options):
    """Return the output of a dry run for 8 GPUs without data, the FLOPs of a step, those of Muon (0 without it) and the
    rows of the table of GPUs."""
    assert train.main(["--dry-run", "--no-data", "--world", "8", *options]) == 0
    out = capsys.readouterr().out
    step = re.search(
        r"^step +(\S+) TFLOP per GPU(?:, for 512 samples|: \S+ for 512 samples, and (\S+) for Muon's.*)$", out, re.M
    )
    rows = re.findall(r"^│ ([^│]*?) +│ ([\d,]+) +│ (\S+) +│ [\d,]+ +│ [\d,]+ +│$", out, re.M)
    return out, *(1e12 * float(flops or 0) for flops in step.groups()), rows


def test_a_dry_run_shows_that_a_step_of_the_fast_recipe_needs_fewer_flops_and_less_memory(capsys):
    for size, most in (("small", 0.38), ("base", 0.59), ("large", 0.81)):
        (out, usual, _, _), (fast_out, fast, muon, _) = (
            _plan(capsys, "--config", size, "--recipe", recipe) for recipe in ("official", "fast")
        )
        assert fast - muon < most * usual and fast < usual
        gigabytes = [float(re.search(r"│ 0 .*│ +([\d.]+) +│", text)[1]) for text in (out, fast_out)]
        assert gigabytes[1] < gigabytes[0]


@pytest.mark.parametrize(("stage", "parts"), [(0, 1), (1, 8)])
def test_a_dry_run_prints_the_flops_of_a_step_and_its_shortest_time_on_each_gpu(capsys, stage, parts):
    """From stage 1 on, each rank orthogonalises only its part of the matrices."""
    settings = ["--set", f"deepspeed.zero_optimization.stage={stage}"]
    out, step, muon, rows = _plan(capsys, "--config", "small", "--recipe", "fast", *settings)
    per_sample = 1e9 * float(re.search(r"([\d.]+) G in this engine", out)[1])
    with torch.device("meta"):
        matrices = M3AE(load_config("small", with_recipe("fast", [])).model).hidden_matrices()
    assert muon == pytest.approx(orthogonalisation_flops(matrices) / parts, rel=0.01)
    assert step == pytest.approx(512 * per_sample + muon, rel=0.01)
    assert [name for name, *_ in rows] == [*hardware.PEAKS]
    for peaks, (_, peak, milliseconds) in zip(hardware.PEAKS.values(), rows):
        assert 1e12 * float(peak.replace(",", "")) == peaks.flops
        assert float(milliseconds) == pytest.approx(1e3 * step / peaks.flops, rel=0.01)
    assert "this is a lower limit, not a prediction" in out


@pytest.mark.parametrize(("micro", "split"), [(None, "1 GPUs x 16 samples"), (4, "4 GPUs x 4 samples")])
def test_a_dry_run_assumes_the_number_of_gpus_that_avoids_gradient_accumulation(capsys, micro, split):
    report(parse(Config, TINY | {"train": TINY["train"] | {"micro_batch": micro}}, "test"), data=False)
    assert f"16 = {split} x 1 micro-batch\n" in capsys.readouterr().out


def test_the_memory_table_shows_every_number_of_ranks_and_zero_stage():
    config = load_config(ROOT / "configs/large.json")
    columns = [list(column.cells) for column in memory_table(config, 10**9, 8, 3e9).columns]
    for stage, name, *cells in zip(range(4), *columns, strict=True):
        weights, gradients, state = (part / 1e9 for part in zero_bytes(10**9, stage, 8, bf16=True))
        assert cells == [f"{gb:.2f}" for gb in (weights, gradients, state, 3, weights + gradients + state + 3)]
        assert ("this config" in name) == (stage == config.zero.stage) and name.startswith(str(stage))


def test_the_memory_table_includes_an_update_by_muon_if_it_needs_more_than_the_activations():
    """At stage 0, an update needs 16 bytes per weight of a matrix. At stages 1 and 2 on 8 GPUs, it needs
    4 * (1 + 3 / 8) bytes. Muon cannot be used with stage 3."""
    config, matrices = load_config("large", with_recipe("fast", [])), 4 * 10**8
    for activations, larger in ((3e9, (6.4, 3, 3)), (0.5e9, (6.4, 2.2, 2.2)), (9e9, (9, 9, 9))):
        columns = [list(column.cells) for column in memory_table(config, 10**9, 8, activations, matrices).columns]
        for stage, _, *cells in zip(range(3), *columns, strict=True):
            state = [part / 1e9 for part in zero_bytes(10**9, stage, 8, True, matrices)]
            assert cells == [f"{gb:.2f}" for gb in (*state, activations / 1e9, sum(state) + larger[stage])]


def test_the_learning_rate_equals_optax_warmup_cosine():
    optim = OptimConfig(peak_lr=1.0, end_lr=0.01, warmup_epochs=10)
    schedule = Schedule(TrainConfig(global_batch=512, steps=110), optim, samples=512)
    rates = [schedule.lr(step) for step in (0, 5, 10, 60, 110, 500)]
    # twice the values of optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 110, 0.01), because the batch is 2 x 256
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.01, 0.02, 0.02])
    assert Schedule(TrainConfig(global_batch=256, steps=10), OptimConfig(peak_lr=1.0, warmup_epochs=0), 1).lr(0) == 1.0


def test_the_shards_of_the_repository_exist():
    assert (CLIPART / "README.md").is_file()


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 63, 64, 504, 512, 4096])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!q]*.json")), ids=lambda p: p.stem)
def test_shipped_configs_start_on_any_number_of_gpus(path, world):
    config = load_config(path).train
    share = split_batch(config, world)
    assert share.global_batch == config.global_batch and share.micro_batch <= config.micro_batch
    assert share.accumulation == 1 or world * config.micro_batch * (share.accumulation - 1) < config.global_batch


def test_a_batch_is_split_evenly_into_few_micro_batches():
    def parts(world, **config):
        share = split_batch(TrainConfig(global_batch=360, steps=1, **config), world)
        return share.micro_batch, share.accumulation

    assert [parts(world, micro_batch=50) for world in (1, 3, 8, 360)] == [(45, 8), (40, 3), (45, 1), (1, 1)]
    # on 7 ranks, each has 51 or 52 samples; on 5, each has 72
    assert [parts(world, micro_batch=50) for world in (7, 5)] == [(26, 2), (36, 2)]
    assert parts(4) == (90, 1)
    with pytest.raises(UserError, match="is 360, which leaves some of the 361 ranks without a sample"):
        parts(361)


@pytest.mark.slow
def test_a_dry_run_fails_if_the_run_would_fail_at_its_start(run):
    assert run("--dry-run")[0] == 0
    for mistake, message in (
        ("data.train.0.shards=/nowhere/x.tar", "/nowhere/x.tar"),
        ("data.tokenizer=/nowhere/tokenizer.json", "no such file"),
        ("data.tokenizer=null", "data.tokenizer: no tokenizer is set"),
        ("model.vocab_size=100", "set model.vocab_size to 2048"),
    ):
        code, err = run("--dry-run", "--set", mistake)
        assert code == 2 and message in err
        assert run("--dry-run", "--no-data", "--set", mistake)[0] == 0
    code, err = run("--dry-run", "--world", "17")
    assert code == 2 and "train.global_batch is 16, which leaves some of the 17 ranks without a sample" in err


@pytest.mark.slow
def test_a_dry_run_without_a_gpu_prints_no_gpu_numbers(run, tmp_path):
    labelled = [{"shards": labelled_tar(tmp_path / "labelled.tar", range(9)), "modality": "image"}]
    probe = json.dumps({"train": labelled, "val": labelled})
    code, out = run("--dry-run", "--set", f"train.probe={probe}", out=True)
    assert code == 0 and not re.search("GPU|TFLOP|ZeRO|sent per", out)
    assert "batch                 16 = 1 rank x 4 samples x 4 micro-batches\n" in out
    for line in (r"memory +[\d.e-]+ GB per rank", r"loader +[\d.e-]+ cores, for .* samples/s, measured over"):
        assert re.search(line, out), line
    assert "\nprobe                 k-NN of 9 samples, with neighbours from 9 labelled samples, 3 classes\n" in out
    code, out = run("--dry-run", "--no-data", out=True)
    assert code == 0 and "GPUs of another machine" in out and not re.search("TFLOP|ZeRO|sent per|cores", out)
    assert "shortest step" in run("--dry-run", "--no-data", "--world", "8", out=True)[1]


@pytest.mark.parametrize(("waiting", "is_reported"), [(0.62, True), (0.2, False)])
def test_a_dry_run_names_the_loader_as_the_bottleneck_if_steps_wait_for_data(monkeypatch, run, waiting, is_reported):
    pace = ThroughputEstimate(0.01, 8, 20, update=0.16, data_wait=waiting)  # 0.32 s for a step of 16 samples
    monkeypatch.setattr("m3ae_fast.training.dry_run.measure", lambda *_: pace)
    code, out = run("--dry-run", "--set", "data.repeats=2", out=True)
    wanted = "62% of the measured time: the loader is the bottleneck on this machine; suggested fix: "
    wanted += "a higher data.workers, smaller images (m3ae-fast shards make --short-side), or data.repeats=3"
    assert code == 0 and re.findall("^data wait +(.*)$", out, re.M) == ([wanted] if is_reported else [])
    assert re.search("^loader +0.097 cores, for 50 samples/s, measured over 20 steps$", out, re.M)


def test_a_dry_run_without_enough_memory_measures_nothing_and_says_so_once(monkeypatch, capsys):
    """The main rank decides for both ranks."""
    monkeypatch.setattr("m3ae_fast.training.dry_run.missing_memory", lambda *_: "")
    for is_main in (True, False):
        ranks = SimpleNamespace(world=2, device=torch.device("cpu"), is_main=is_main, from_main=lambda _: "8 GB")
        report_time(parse(Config, TINY, "test"), SimpleNamespace(ranks=ranks))
    assert capsys.readouterr().out == f"{'time':21} not measured on this machine: 8 GB\n"


@pytest.mark.slow
def test_a_dry_run_measures_the_wait_for_a_slow_loader(monkeypatch, run):
    monkeypatch.setattr("m3ae_fast.engine.feed.islice", lambda *given: time.sleep(0.5) or islice(*given))
    code, out = run("--dry-run", out=True)
    assert code == 0 and re.search("^data wait .*: the loader is the bottleneck on this machine", out, re.M)


@pytest.mark.slow
def test_a_dry_run_prints_its_progress(run):
    code, output = run("--dry-run")
    stages = ["importing torch", "opening the data", "measuring steps of 8 samples"]
    assert code == 0 and [*dict.fromkeys(line for line in output.splitlines() if "so far" not in line)] == stages


def test_a_dry_run_checks_the_shards_of_the_probe(run, tmp_path):
    good = labelled_tar(tmp_path / "good.tar", range(6))
    for name, wrong, message in (
        ("train", "/nowhere/x.tar", "/nowhere/x.tar"),
        ("val", "/nowhere/x.tar", "/nowhere/x.tar"),
        ("train", str(CLIPART / "val-0000.tar"), "no label (cls)"),
        ("val", labelled_tar(tmp_path / "other.tar", range(3), {0: 7}), "no training sample has the label 7"),
    ):
        probe = {part: [{"shards": good, "modality": "image"}] for part in ("train", "val")}
        probe[name][0]["shards"] = wrong
        option = ("--set", f"train.probe={json.dumps(probe)}")
        code, err = run("--dry-run", *option)
        assert code == 2 and message in err, (name, err)
        assert run("--dry-run", "--no-data", *option)[0] == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_network_traffic(run):
    code, out = run("--dry-run", "--world", "4", "--set", "train.micro_batch=3", out=True)
    assert code == 0 and "16 = 4 GPUs x 2 samples x 2 micro-batches (" in out
    assert "16 = 3 GPUs x at most 3 samples x 2 micro-batches" in run("--dry-run", "--world", "3", out=True)[1]
    for needed in ("sent per GPU in each step", "shortest step", "GB per GPU", "512 samples, 512 held out"):
        assert needed in out
    one, many = (network_bytes(1000, 0, world, 1, False, True) for world in (1, 1000))
    assert one == 0 and many == pytest.approx(8000, rel=2e-3)  # an all-reduce sends everything twice
    assert network_bytes(1000, 2, 2, 4, True, True) == 4 * 2 * 2000 + 1000
    assert network_bytes(1000, 3, 2, 4, True, False) == 4 * (1000 + 1000)
    assert network_bytes(10**9, 3, 2, 4, True, False) == 4 * (1 + 1.5) * 10**9  # half of the weights are gathered twice


def test_the_loader_of_the_shortest_step_needs_cores_for_one_gpu_and_for_all():
    """On an H100, a step of 0.989 TFLOP takes at least 1 ms. In this time, a core prepares 0.514 images."""
    for world, cores in ((1, {"cores for 1 GPU": "234"}), (8, {"cores for 1 GPU": "234", "cores for 8 GPUs": "1,867"})):
        table = shortest_steps(0.989e12, 119.9, world)
        columns = [list(column.cells) for column in table.columns]
        row = next(row for row in zip(*columns) if row[0] == "H100")
        assert dict(zip([column.header for column in table.columns[3:]], row[3:])) == cores and row[2] == "1"


def test_a_dry_run_counts_the_exchange_and_the_memory_of_updates_by_muon(capsys):
    """With ZeRO stages 1 and 2, the updates are gathered once per step, in float32, 4 bytes per weight of a matrix. At
    stage 0, every rank computes all updates."""
    for stage, all_sent in ((0, 0), (1, 4 * 800), (2, 4 * 800)):
        usual = network_bytes(1000, stage, 4, 3, True, True)
        assert network_bytes(1000, stage, 4, 3, True, True, matrices=800) == usual + all_sent * 3 / 4
    with torch.device("meta"):
        matrices = sum(p.numel() for p in M3AE(load_config("small", with_recipe("fast", [])).model).hidden_matrices())
    for stage, is_named in ((0, False), (1, True), (2, True)):
        options = ["--dry-run", "--no-data", "--world", "8", "--set", f"deepspeed.zero_optimization.stage={stage}"]
        assert train.main(["--config", "small", "--recipe", "fast", *options]) == 0
        out = capsys.readouterr().out
        named = re.search(r"GB sent per GPU in each step, of which ([\d.]+) GB are Muon's updates$", out, re.M)
        assert bool(named) == is_named
        if named:
            assert named[1] == f"{4 * matrices * 7 / 8 / 1e9:.2f}"
        needed = [f"{4 * matrices * copies / 1e9:.2f} GB" for copies in (4, 1 + 3 / 8)]
        assert "an update needs {} at stage 0 and {} at stages 1 and 2".format(*needed) in out


def test_a_dry_run_prints_how_much_a_node_downloads(tmp_path):
    """With 640 shards of 1 GB in 64 lanes on 16 nodes, each node owns 40 shards and shuffles 8 at a time."""
    names = [f"s3://bucket/{i:03}.tar" for i in range(640)]
    write(tmp_path / "far.npy", rows_of(names, [(1000, 10**9, KINDS.index("paired"))] * 640))
    config = load_config(ROOT / "configs/large.json", [f"data.train.0.shards={tmp_path / 'far.npy'}"])
    corpus = open_corpus(config.data.train, ShardStore(tmp_path / "cache"))
    lines = dict(fetching_lines(config, corpus, 128))
    assert lines["fetching"] == "at most 8 GB for a node with 8 ranks before the first step, and 40 GB in an epoch"
    assert re.search(" 16 GB .* 40 GB", lines["disk of a node"])


@pytest.mark.slow
def test_repeated_views_increase_the_length_of_an_epoch(run):
    for repeats, steps in ((1, 32), (3, 96)):
        options = ("train.steps=null", "train.epochs=1", f"data.repeats={repeats}")
        _, out = run("--dry-run", *(word for option in options for word in ("--set", option)), out=True)
        assert f"; {steps} steps" in out and f" on this machine: {steps} steps of " in out


WRITTEN = {name: page() for name, page in runpy.run_path(str(ROOT / "docs/write_settings.py"))["PAGES"].items()}
SETTINGS = {name: WRITTEN[name] for name in ("config.md", "evaluation-config.md")}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_generated_pages_are_current(name):
    assert WRITTEN[name] == (ROOT / "docs" / name).read_text(), "run python docs/write_settings.py"


def test_every_setting_is_explained():
    rows = [line.split(" | ") for page in SETTINGS.values() for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 and len(row[3]) > 10 for row in rows)
    for name in ("peak_lr", "micro_batch", "reduce_bucket_size", "crop_scale", "layer_decay", "epsilons"):
        assert any(row[0] == f"| `{name}`" for row in rows)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("gelu", '`"tanh"`, `"exact"`'),
        ("channels", "integer ≥ 1, ≤ 256"),
        ("size", '`"small"`, `"base"`, `"large"`, `"huge"` or `null`'),
        ("flip", "`true`, `false`"),
        ("mlp_ratio", "number > 0, ≤ 64"),
        ("depth", "integer > 0, ≤ 1,024"),
        ("seed", "integer ≥ 0, < 2^63"),
        ("warmup_epochs", "number ≥ 0, ≤ 1,000,000"),
        ("ema", "number > 0, < 1 or `null`"),
        ("betas", "list of 2: number ≥ 0, < 1"),
        ("image_mean", "list: number"),
        ("shards", "string or list: string"),
        ("val", "list: [data.train](#datatrain)"),
    ],
)
def test_the_page_of_settings_lists_the_allowed_values(key, allowed):
    row = next(line for line in SETTINGS["config.md"].splitlines() if line.startswith(f"| `{key}` |"))
    assert row.split(" | ")[2] == allowed


def test_each_type_of_config_section_is_explained_once():
    pages = [[line for line in page.splitlines() if line.startswith("## ")] for page in SETTINGS.values()]
    assert all(len(headings) == len(set(headings)) for headings in pages)
    assert {*pages[0]} & {*pages[1]} == {"## model"}  # evaluations have other settings in this section
    assert "## data.train" in pages[0] and "## data.val" not in pages[0]
    assert "| finetune | deepspeed | all settings (`null`, which is plain torch) |" in SETTINGS["evaluation-config.md"]


def test_no_setting_is_listed_on_both_pages():
    rows = [{line for line in page.splitlines() if line.startswith("| `")} for page in SETTINGS.values()]
    assert not rows[0] & rows[1]


def test_every_program_is_listed_in_the_help():
    """`python -m m3ae_fast` lists everything that can be run."""
    programs = {
        path.stem if path.name != "__main__.py" else path.parent.name
        for path in (ROOT / "m3ae_fast").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    started = {"m3ae_fast", "s3_and_gs"}  # a run starts s3_and_gs to download shards
    assert programs - started == {module.rpartition(".")[2] for module in MODULES.values()}
    listed = subprocess.run([sys.executable, "-m", "m3ae_fast"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"\n  {name} " in listed for name in MODULES)
    wrong = subprocess.run([sys.executable, "-m", "m3ae_fast", "tran"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_the_official_hyper_parameters_are_the_defaults():
    """The official hyper-parameters are in arXiv 2205.14204, its appendix and its public code."""
    config = parse(Config, {"data": {"train": [{"shards": "a.tar"}]}, "train": {"epochs": 1}}, "test")
    model, optim = config.model, config.optim
    assert (model.emb_dim, model.depth, model.num_heads, model.mlp_ratio) == (1024, 24, 16, 4)
    assert (model.dec_emb_dim, model.dec_depth, model.dec_num_heads, model.output_head_depth) == (512, 8, 16, 0)
    assert (model.image_size, model.patch_size, model.text_length, model.vocab_size) == (256, 16, 64, 30522)
    assert (model.drop_path, model.use_type_embedding) == (0, True)
    assert model.image_mean == (0.5762, 0.5503, 0.5213) and model.image_std == (0.3207, 0.3169, 0.3307)
    assert (config.masking.image_ratio, config.masking.text_ratio) == (0.75, 0.75)
    assert (config.loss.image_weight, config.loss.text_weight, config.loss.norm_pix) == (1, 0.5, False)
    assert (config.loss.image_all_tokens, config.loss.text_all_tokens) == (False, False)
    assert (optim.betas, ADAM_EPS, optim.weight_decay, optim.clip_grad) == ((0.9, 0.95), 1e-8, 0.05, None)
    assert (optim.peak_lr, optim.end_lr, optim.warmup_epochs) == (1.5e-4, 0, 5)
    assert (config.train.global_batch, config.data.crop_scale, config.data.flip) == (4096, (0.2, 1.0), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"crop_scale": [0, 1]}}, "crop_scale"),
        ({"data": {"crop_scale": [0.5, 0.4]}}, "crop_scale"),
        ({"data": {"crop_scale": [0.5, 1.1]}}, "crop_scale"),
        ({"data": {"train": [{"shards": "a", "weight": 1}, {"shards": "b"}]}}, "for all sources or for none"),
        ({"data": {"val": [{"shards": "a"}, {"shards": "b", "weight": 1}]}}, "for all sources or for none"),
        ({"train": {"epochs": 2, "steps": 2}}, "set epochs or steps, not both"),
        ({"train": {"epochs": None}}, "set the length of the run: epochs or steps"),
        (
            {"model": {"text_length": 1 << 16, "size": None, "emb_dim": 4096, "depth": 1, "num_heads": 1}},
            "of 65,536 pat",
        ),
    ],
)
def test_contradicting_settings_are_refused(change, message):
    data = {"data": {"train": [{"shards": "a.tar"}]}, "train": {"epochs": 1}}
    parse(Config, data, "test")
    with pytest.raises(UserError, match=message):
        parse(Config, {**change, **{name: values | change.get(name, {}) for name, values in data.items()}}, "test")


def test_paths_in_a_config_follow_a_moved_run_folder_if_it_contains_the_files(tmp_path):
    (tmp_path / "shards").mkdir()
    config = {
        "run": {"dir": "/a"},
        "data": {"train": [{"shards": ["/a/shards/0.tar", "/a/b.tar", "/ab/shards/0.tar"]}]},
    }
    found = follow(config, tmp_path)
    assert found["run"] == {"dir": str(tmp_path)}  # no other setting is added to the section
    assert found["data"]["train"][0]["shards"] == [f"{tmp_path}/shards/0.tar", "/a/b.tar", "/ab/shards/0.tar"]
    for other in ({"run": {"dir": str(tmp_path)}}, {"run": {"dir": "a"}}, {"run": {"dir": 5}}, {"run": None}, {}):
        assert follow(other, tmp_path) is other
