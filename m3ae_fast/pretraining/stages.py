"""The stages of `pretrain`. A completed stage is not repeated: a call after an interruption resumes with the first
incomplete stage."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_fast import checkpoint
from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import unused_gpus, uses_gpu
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.config import (
    Config,
    Range,
    follow,
    load_config,
    read_config,
    stored_config,
)
from m3ae_fast.config.arguments import accepts
from m3ae_fast.config.poolings import usual_pool
from m3ae_fast.data.labels import check_field
from m3ae_fast.evaluation.knn_during_training import knn_probe
from m3ae_fast.evaluation.run_report import REPORT_FILE, summary, write_report
from m3ae_fast.model.pretrained import Pretrained
from m3ae_fast.pretraining import SEVERAL_RANKS
from m3ae_fast.pretraining.automatic_settings import Inputs, by_setting, check_overrides, teacher_settings
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.pretraining.final_evaluation import (
    RUN,
    evaluate_run,
    shard_names,
    stage,
    table,
    verdict,
)
from m3ae_fast.pretraining.given_weights import GivenWeights, given_weights
from m3ae_fast.pretraining.options import PretrainOptions
from m3ae_fast.pretraining.recipe_choice import PREFERRED, ChosenRecipe, choose_recipe
from m3ae_fast.pretraining.size_and_length import Plan, choose
from m3ae_fast.pretraining.source_shards import find_shards
from m3ae_fast.pretraining.time_spent import TimeSpent
from m3ae_fast.process.launchers import alone
from m3ae_fast.training.run import pre_train
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.training.run_state import status
from m3ae_fast.training.teacher import open_teacher, width_of
from m3ae_fast.weights.converting import convert

CONFIG, EXPORT = "config.json", "export"  # names in the run folder


class Outcome(NamedTuple):
    """The content of the run folder at the end."""

    run: Path
    finished: bool  # False: the run was stopped; repeating the call resumes it
    export: Path  # folder for `M3AE.from_pretrained`
    report: Path
    results: dict[str, dict[str, Any]]  # results by task and by model; empty without classes


class _Call(PretrainOptions):
    """A call of `pretrain` and its options."""

    began: float  # value of `time.monotonic` at the beginning of the call

    @property
    def config_file(self) -> Path:
        return self.out / CONFIG

    @property
    def all_overrides(self) -> list[str]:
        """Return three kinds of overrides: those given by the user, those of the teacher, and one that sets `run.dir`,
        because the run folder may have been moved or copied."""
        return [*teacher_settings(self.teacher), *super().all_overrides, f"run.dir={json.dumps(str(self.out))}"]

    @property
    def continues(self) -> bool:
        """Return whether this call uses the config that an earlier call has written. A dry run does not."""
        return self.config_file.exists() and not self.dry_run

    def load_config(self) -> Config:
        """Return the config that has been written, with the overrides. Raises UserError if it is invalid."""
        return load_config(self.config_file, by_setting(self.all_overrides))


@accepts(PretrainOptions)
def pretrain(source: str | Path, out: str | Path, **options: Any) -> Outcome:
    """Train a model on images and, if there are any, on their captions; evaluate the model and export it. If `out`
    contains a run, it is resumed with its own settings, except those in `overrides`; `hours`, `recipe`, `start_from`
    and `labels` have no effect.

    If `hours` are too short to learn much and stdin is a terminal, the user is asked whether to start.

    Args:
        source: a folder of images (with captions in .txt files or in a table, and sub-folders as classes), shards, an
            HDF5 file in the layout of the official code, or a Hugging Face dataset: a name, or a folder with its files.
        out: the run folder, which contains all output.
        options: the options of the command, such as `hours=8`: the fields of `options.PretrainOptions`. With a model as
            `start_from` (`--from` of the command), the run has the size of this model, a lower learning rate and a
            shorter warm-up.

    Returns:
        The content of the run folder at the end.

    Raises:
        UserError: the source cannot be used, an option is invalid, `out` cannot be written, or the user declines to
            start.
    """
    call = _Call(source=source, out=out, began=time.monotonic(), **options)
    value_range = _check(call)
    with RunFolder(call.out) as folder:  # locks the folder until this call has ended
        return _run_stages(call, value_range, folder)


def _run_stages(call: _Call, value_range: Range | None, folder: RunFolder) -> Outcome:
    """Run the stages that are not completed yet, in the locked run folder. `value_range`: value range of the images;
    None: detected. Raises UserError as `pretrain` does."""
    spent = TimeSpent(call.began)
    _check_folder(call)
    config = _kept_config(call) if call.continues else None
    config = config or _chosen_config(call, value_range)
    outcome = Outcome(call.out, False, call.out / EXPORT, call.out / REPORT_FILE, {})
    device = call.device
    if call.dry_run or config is None:
        return outcome
    with stage(device) as session:
        config = session.ranks.broadcast(call.load_config)
        if others := unused_gpus(session.ranks.world, session.ranks.device):
            print(f"note: unused GPUs of this machine: {others}; {SEVERAL_RANKS}", flush=True)
        spent.add("preparation")
        evaluating = pre_train(config, session, resume="auto", make_probe=knn_probe, folder=folder)
    spent.add("training steps")
    spent.move(evaluating, "training steps", "evaluations during training")
    if session.stop.requested or status(call.out)[0] != "finished":
        return outcome
    results = evaluate_run(config, device) if config.train.probe else {}
    if results is None:
        return outcome
    spent.add("evaluation after training")
    _present(config, results, outcome)
    spent.add("report and export")
    print(f"{spent.line()}\n{verdict(outcome.run, results)}")
    return outcome._replace(finished=True, results=results)


def _check(call: _Call) -> Range | None:
    """Check the call before any work, and return the value range of the images; None if no override sets it. Raises
    UserError if the call is not possible."""
    if not alone():
        raise UserError(SEVERAL_RANKS)
    uses_gpu(call.device)
    value_range = check_overrides(call.overrides, call.start_from, call.teacher).model.value_range
    s3_and_gs.require(call.source, *call.val)
    check_field(call.labels)
    if call.out.exists() and not call.out.is_dir():
        raise UserError(f"--out {call.out}: is not a folder; specify a new or an existing folder")
    return value_range


def _check_folder(call: _Call) -> None:
    """Raise UserError if the content of the run folder does not permit this call."""
    if not call.config_file.exists() and checkpoint.saved_steps(call.out):
        raise UserError(
            f"--out {call.out}: contains checkpoints, but not the {CONFIG} of their run; choose another --out"
        )
    if call.dry_run and call.config_file.exists():  # the tokenizer and the shards of that run would be replaced
        raise UserError(f"--dry-run: {call.out} contains a run, whose settings are kept; choose another --out")


def _present(config: Config, results: dict[str, dict[str, Any]], outcome: Outcome) -> None:
    """Print the summary of the run and the results of the evaluations, and write the report and the export."""
    words, unusual = summary(outcome.run, read_metrics(outcome.run))
    print(words)
    for name, what, suggestion in unusual:
        print(f"warning: {name}: {what}; to try: {suggestion}")
    if results:
        print("\n".join(table(results)))
    write_report(outcome.run, outcome.report)
    # The export has the pooling with the highest accuracy. It keeps the run's own pooling if there are no labels, or if
    # the user has set a pooling that is not the default.
    chosen = next((found[RUN].get("pool") for found in results.values()), None)
    is_usual = config.model.pool == usual_pool(config.model.emb_dim)
    exported = convert(outcome.run, outcome.export, pool=chosen if is_usual else None)
    assert isinstance(exported, Pretrained)  # not an image tokenizer
    print(f"{outcome.report}: curves and figures")
    print(f"{outcome.export}: model for m3ae_fast.load_model; pooling of its features: {exported.config.pool}")


def _kept_config(call: _Call) -> Config | None:
    """Write the shards that are missing, and return the config that an earlier call has written. If the source has
    changed before training has begun, the config is removed, and None is returned. Raises UserError if an override is
    invalid."""
    call.load_config()  # raises an error for invalid settings before any work begins
    _follow(call.config_file)
    config = call.load_config()
    kept, value_range = shard_names(config.data.train), config.model.value_range
    find_shards(call, value_range, kept=kept)
    if not call.continues:
        print(f"note: {call.source}, --group or --labels has changed, so the settings are chosen again", flush=True)
        return None
    config = call.load_config()
    print(
        f"{call.config_file} already exists: its settings are kept, except those given with --set. --hours, --recipe, "
        "--from and --labels have no effect. For newly chosen settings, choose another --out"
    )
    print(how_to_train_longer(config))
    return config


def _chosen_config(call: _Call, value_range: Range | None) -> Config | None:
    """Choose the settings of a new run, print them, and write them to the run folder unless this is a dry run. Return
    the config; None if a stop is requested in the meantime. `value_range`: value range of the images. Raises UserError
    if the source or the weights cannot be used, or if the user declines to start."""
    own, weights = call.all_overrides, GivenWeights([], [])
    if call.teacher is not None:
        own = [*own, f"model.target_width={width_of(call.teacher)}"]
    overrides = own
    if call.start_from is not None:
        weights = given_weights(call.start_from, call.out, overrides)
        overrides = [*weights.overrides, *overrides]
    start_range = weights.config.value_range if weights.config else None
    shards = find_shards(call, value_range, start_range=start_range)
    # HOG targets cannot be combined with the targets of a teacher
    preferred = PREFERRED if call.teacher is None else PREFERRED[1:]
    method = choose_recipe(call.recipe, overrides, preferred) if call.start_from is None else ChosenRecipe([], "")
    plan: Plan | None = None
    with stage(call.device) as session:
        statistics, notes = inspect(
            shards,
            call.out,
            call.labels,
            value_range,
            [*method.overrides, *overrides],
            start=weights.config,
            own=own,
        )
        given = [*method.overrides, *weights.overrides, *statistics.fitted, *own]
        plan = choose(Inputs(statistics, shards, call.out, given, call.labels), call.hours, session, call.began)
    if plan is None:
        return None
    notes = [*weights.notes, *shards.notes, *notes]
    printed = (note if note.startswith(" ") else f"note: {note}" for note in notes)  # indented lines are examples
    teacher = open_teacher(plan.config)
    described = [f"teacher: {teacher.describe(plan.config)}"] if teacher else []
    lines = [*plan.lines, *filter(None, [method.line]), *described, *printed]
    print("\n".join(lines), flush=True)
    if plan.warning:
        print(f"warning: {plan.warning}", flush=True)
    if not call.dry_run:
        if plan.warning:
            _ask_whether_to_start()
        _write(plan.config, call)
    return plan.config


def _write(config: Config, call: _Call) -> None:
    """Write the config of a new run. Raises UserError if the folder cannot be written to."""
    text = json.dumps(stored_config(config), indent=2)  # the text includes settings with their default values
    write_text_atomically(call.config_file, f"{text}\n")
    print(f"{call.config_file} contains all settings; --set section.key=value overrides them", flush=True)


def how_to_train_longer(config: Config) -> str:
    """Return advice on how to train a run of this config for longer than its current length."""
    train = config.train
    name = next(name for name in ("hours", "steps", "epochs") if getattr(train, name))
    advice = f"to train longer, increase the total number of {name}, now {getattr(train, name)}: --set train.{name}=N"
    if config.optim.decay is not None:
        return advice
    return (
        f"{advice}; do this before the run is finished, because a finished run can be extended without a jump of the "
        "learning rate only if it began with --set optim.schedule=wsd"
    )


def _ask_whether_to_start() -> None:
    """Ask the user whether to start if stdin is a terminal. Raises UserError if the answer is no."""
    if not (sys.stdin and sys.stdin.isatty()):
        return
    try:
        answer = input("start anyway? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("the run was not started; increase --hours")


def _follow(path: Path) -> None:
    """Update the paths in the config of a run folder that was moved or copied."""
    data = read_config(path, "config")
    followed = follow(data, path.parent.resolve())
    if followed != data:
        write_text_atomically(path, json.dumps(followed, indent=2) + "\n")
        print(
            f"{path}: the run folder has moved from {data['run']['dir']} to {followed['run']['dir']}; its paths "
            "are updated"
        )
