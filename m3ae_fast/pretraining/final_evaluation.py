"""Evaluation of the features at the end of a run, compared with baselines: the same network with random weights,
features that are computed from the pixels without a network, and always predicting the largest class."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.checkpoint.state_files import sha256
from m3ae_fast.config import Config, SourceConfig
from m3ae_fast.evaluation.baseline_results import BASELINES, LARGEST, MODEL, WITH_HOG
from m3ae_fast.evaluation.compare import with_error
from m3ae_fast.evaluation.compare_results import all_differences
from m3ae_fast.evaluation.job import RESULT_FILE, SharedFeatures
from m3ae_fast.evaluation.significance import Difference
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.pretraining import RESUME_NOTE
from m3ae_fast.process.how_to_resume import resumed_by
from m3ae_fast.process.session import Session, joined_program

_TASKS = {"knn": "k-NN", "logistic": "logistic regression"}
RESULTS = "results"  # a folder in the run folder
_CLEAR = 2  # minimum difference, in standard errors, that is reported as an improvement
_MEASURED = "measured"  # file in the folder of the results that identifies the evaluated checkpoint
RUN = "this run"
STARTED, TEACHER = "its initial weights", "its teacher"


# The results of a task for a model are in a folder whose name consists of the task and this suffix.
_SUFFIXES = {RUN: "", STARTED: "-start", TEACHER: "-teacher"}


def _models(config: Config) -> dict[str, str]:
    """Return the names of the models to evaluate, keyed by their relation to the run. The run's baselines are not
    listed, because they are evaluated together with the run."""
    start, teacher = config.model.init_from, config.loss.teacher
    started = {STARTED: start} if start and Path(start).is_dir() else {}
    return {RUN: str(config.run.dir)} | started | ({TEACHER: teacher} if teacher else {})


@contextmanager
def stage(device: Device | None) -> Iterator[Session]:
    """Yield a session as `joined_program` does, for one of several stages of a program. After the stage,
    `stop.requested` states whether a stop was requested, even if the stage has completed."""
    with resumed_by("the same command"), joined_program(device) as session:
        session.stop.advice = RESUME_NOTE
        yield session


def evaluate_run(config: Config, device: Device | None = None) -> dict[str, dict[str, Any]] | None:
    """Evaluate the run and its baselines, and return the results by task and by model; return None if a task was
    stopped. If the run started from given weights or has a teacher, these are evaluated too. Results of an earlier call
    for the same weights are reused. `train.probe` must be set. Raises UserError if a task fails, except for the
    teacher. A teacher may read other images or compute no vector per image, so it is left out if a task fails for
    it."""
    probe, run = config.train.probe, config.run.dir
    assert probe is not None
    _forget_other_weights(run)
    out = {(task, whose): run / RESULTS / f"{task}{suffix}" for task in _TASKS for whose, suffix in _SUFFIXES.items()}
    models = _models(config)
    for whose, model in [*models.items()]:
        missing = [task for task in _TASKS if not (out[task, whose] / RESULT_FILE).exists()]
        if not missing:
            continue
        try:
            with stage(device) as session:
                shared = SharedFeatures()
                for task in missing:
                    if session.stop.requested:
                        break
                    print(f"{_TASKS[task]} of {whose}:", flush=True)
                    evaluate(
                        task,
                        model,
                        train=shard_names(probe.train),
                        val=shard_names(probe.val),
                        labels=probe.labels,
                        out=out[task, whose],
                        baselines=whose == RUN,
                        session=session,
                        shared=shared,
                    )
        except UserError as error:
            if whose != TEACHER:
                raise
            print(f"note: {whose} is not evaluated: {error}", flush=True)
            del models[whose]
            continue
        if session.stop.requested or not all((out[task, whose] / RESULT_FILE).exists() for task in missing):
            return None
    return {task: {whose: _result(out[task, whose] / RESULT_FILE) for whose in models} for task in _TASKS}


def _result(path: Path) -> dict[str, Any]:
    """Return the content of a result file. Raises UserError if it is damaged."""
    try:
        found = read_json(path)
        with_error(found), found["val_samples"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove {path.parent} to repeat the evaluation") from None
    return found


def _forget_other_weights(run: Path) -> None:
    """Remove the results if they do not belong to the run's last checkpoint."""
    mark = run / RESULTS / _MEASURED
    now = sha256(checkpoint.locate(run) / checkpoint.INFO_FILE) + "\n"  # the file contains the checksums of the weights
    try:
        if mark.exists() and mark.read_bytes() == now.encode():
            return
        if mark.parent.exists():
            shutil.rmtree(mark.parent)
    except OSError as error:
        raise UserError(f"{error.filename or mark.parent}: cannot be replaced ({error.strerror or error})") from None
    write_text_atomically(mark, now)


def shard_names(sources: list[SourceConfig]) -> list[str]:
    """Return the names of the sources' shards, as in the config."""
    return [
        name for source in sources for name in ([source.shards] if isinstance(source.shards, str) else source.shards)
    ]


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table of the accuracies on held-out samples by model and task, with their standard errors.
    The last line shows the share of the largest class."""
    accuracies = {task: _by_model(results) for task, results in found.items()}
    for task, results in found.items():
        if WITH_HOG in results[RUN]:
            accuracies[task] = {RUN: results[RUN], f"{RUN} with HOG": results[RUN][WITH_HOG], **accuracies[task]}
    first = next(iter(accuracies.values()))
    width = max(map(len, _TASKS.values())) + 4
    lines = [f"{'held-out accuracy, %':22}" + "".join(f"{_TASKS[task]:>{width}}" for task in found)]
    for whose in first:
        lines.append(f"{whose:22}" + "".join(f"{with_error(own[whose]):>{width}}" for own in accuracies.values()))
    shares = "".join(f"{100 * results[RUN].get('chance', math.nan):>{width}.1f}" for results in found.values())
    return [*lines, f"{LARGEST:22}{shares}   ({first[RUN]['val_samples']:,} samples)"]


def verdict(run: Path, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one sentence that states whether the run is better than everything that needs no training: the baselines,
    always predicting the largest class and, if they exist, the given weights from which the run started and its
    teacher. The sentence is about the task with the highest accuracy of the run or of anything that needs no training.
    The run counts as better only if the difference is significant and above two standard errors. `found`: results by
    task and by model; empty without classes."""
    if not found:
        return "verdict: none, because evaluating the features needs held-out samples with classes"
    task = max(found, key=lambda task: max(each["top1"] for each in _by_model(found[task]).values()))
    result = found[task][RUN]
    others = {whose: run / RESULTS / f"{task}{_SUFFIXES[whose]}" for whose in found[task] if whose != RUN}
    apart, _ = all_differences(run / RESULTS / task, result, RUN, others)
    strongest_first = sorted(apart.items(), key=lambda item: item[1].value)
    free: dict[str, Difference | None] = dict(strongest_first)
    # for the following models, the difference from the run is unknown
    free |= {name: None for name in _by_model(found[task]) if name != RUN and name not in free}
    better = [name for name, each in free.items() if each and each.is_better and each.value > _CLEAR * each.error]
    sure, unsure = (
        ", ".join(
            name + (f" ({_points(each)})" if each else "")
            for name, each in free.items()
            if (name in better) == is_better
        )
        for is_better in (True, False)
    )
    if not unsure:
        words = f"is better than everything that needs no training: {sure}"
    else:
        words = f"is better than {sure}, but not better than {unsure}" if sure else f"is not better than {unsure}"
        words += f", which need{'s' if len(free) == len(better) + 1 else ''} no training"
    if together := result.get(WITH_HOG):
        words += f"; its features with HOG: {with_error(together)} %"
        if MODEL in together["differences"]:
            words += f" ({_points(Difference.read(together['differences'][MODEL]))})"
    return f"verdict: by {_TASKS[task]} ({with_error(result)} %), {RUN} {words}"


def _points(each: Difference) -> str:
    return f"{100 * each.value:+.1f} ± {100 * each.error:.1f} points"


def _by_model(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of a task by model, including those of the baselines."""
    return {RUN: results[RUN], **results[RUN].get(BASELINES, {}), **results}
