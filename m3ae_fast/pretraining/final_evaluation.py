"""What a run's features are good for, compared with those of the same network untrained, with the pixels themselves and
with the largest class."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import write_whole
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.checkpoint.state_files import sha256
from m3ae_fast.config import Config, SourceConfig
from m3ae_fast.evaluation.compare import SCALED, UNTRAINED, with_error
from m3ae_fast.evaluation.difference import LARGEST, against_largest_class, in_words
from m3ae_fast.evaluation.job import RESULT_FILE
from m3ae_fast.evaluation.run_figures import feature_map
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.evaluation.tasks import MAP_NEEDS
from m3ae_fast.pretraining import GOES_ON
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.training.loggers import show
from m3ae_fast.weights.model_name import PIXELS, RANDOM

_TASKS = {"knn": "k-NN", "linear": "linear probe"}
_QUIET = ["linear.log_every=1000", "linear.eval_every=1000"]
_OPTIONS: dict[str, dict[str, Any]] = {
    "knn": {},
    "linear": {"cache_features": True, "overrides": _QUIET},
}  # of a model
_ON_A_MAP = 2000  # samples: t-SNE takes half a minute
RESULTS, MAP = "results", "map.png"  # of a run folder
_MEASURED = "measured"  # file next to the results that names their checkpoint
RUN = "this run"
STARTED = "its initial weights"


# what is measured: what stands behind the task in the name of its results' folder
_SUFFIXES = {RUN: "", UNTRAINED: "-random", SCALED: "-pixels", STARTED: "-start"}


def _models(config: Config) -> dict[str, str]:
    """Return the models that are measured, by what each is to the run."""
    run, start = str(config.run.dir), config.model.init_from
    models = {RUN: run, UNTRAINED: f"{RANDOM}{run}", SCALED: f"{PIXELS}{run}"}
    return models | ({STARTED: start} if start and Path(start).is_dir() else {})


@contextmanager
def stage() -> Iterator[Session]:
    """Run a program as a stage of a longer line, as `joined_program` does; `stop.asked` says afterwards whether
    somebody has asked to stop, even where the stage has come to its end."""
    with joined_program() as session:
        session.stop.at_leaving = lambda: GOES_ON if session.ranks.is_main else ""
        yield session


def evaluate_run(config: Config) -> dict[str, dict[str, Any]] | None:
    """Return by task the results of the run, of random weights and of pixels; results that an earlier call measured for
    the same weights is read. None if a task was stopped. Raises UserError if a task cannot be done."""
    probe, run = config.train.probe, config.run.dir
    assert probe is not None
    _forget_other_weights(run)
    found: dict[str, dict[str, Any]] = {}
    for task, title in _TASKS.items():
        for whose, model in _models(config).items():
            out = run / RESULTS / f"{task}{_SUFFIXES[whose]}"
            if not (out / RESULT_FILE).exists():
                options = _OPTIONS[task] if whose != SCALED else {}
                print(f"{title} of {whose}:", flush=True)
                with stage() as session:
                    evaluate(
                        task,
                        model,
                        train=_shards(probe.train),
                        val=_shards(probe.val),
                        labels=probe.labels,
                        out=out,
                        session=session,
                        **options,
                    )
                if session.stop.asked or not (out / RESULT_FILE).exists():
                    return None
            found.setdefault(task, {})[whose] = read_json(out / RESULT_FILE)
    return found


def _forget_other_weights(run: Path) -> None:
    """Remove the results and the map of a checkpoint that is not the run's last one."""
    mark = run / RESULTS / _MEASURED
    now = sha256(checkpoint.locate(run) / checkpoint.INFO_FILE) + "\n"  # which has the weights' checksums
    try:
        if mark.exists() and mark.read_bytes() == now.encode():
            return
        if mark.parent.exists():
            shutil.rmtree(mark.parent)
        (run / MAP).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or mark.parent}: cannot be replaced ({error.strerror or error})") from None
    write_whole(mark, now)


def why_no_map() -> str:
    """Return why no map of the features can be drawn here, "" if one can."""
    try:
        require_libraries(MAP_NEEDS)
    except UserError as error:
        return str(error)
    return ""


def draw_map(config: Config) -> None:
    """Draw held-out samples by their features and classes into the run folder, and show it where the run's other
    pictures are; print why where that is not possible. A map that is there already stays."""
    probe, run = config.train.probe, config.run.dir
    assert probe is not None
    path = run / MAP
    if path.exists():
        return
    try:
        feature_map(run, path, labels=probe.labels, samples=_ON_A_MAP, shards=_shards(probe.val))
        show(run, config.run.loggers, checkpoint.step_of(checkpoint.locate(run)), "map", path)
    except UserError as error:
        print(f"note: no map of the features: {error}", flush=True)


def _shards(sources: list[SourceConfig]) -> list[str]:
    return [
        name for source in sources for name in ([source.shards] if isinstance(source.shards, str) else source.shards)
    ]


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return lines: accuracy and standard error on held-out samples, of each evaluation and of the largest class, by
    task."""
    first = next(iter(found.values()))
    width = max(map(len, _TASKS.values())) + 4
    lines = [f"{'accuracy, held out, %':22}" + "".join(f"{_TASKS[task]:>{width}}" for task in found)]
    for whose in first:
        lines.append(f"{whose:22}" + "".join(f"{with_error(found[task][whose]):>{width}}" for task in found))
    shares = "".join(f"{100 * results[RUN].get('chance', math.nan):>{width}.1f}" for results in found.values())
    return [*lines, f"{LARGEST:22}{shares}   ({first[RUN]['val_samples']:,} samples)"]


def verdicts(run: Path, tasks: Iterable[str]) -> list[str]:
    """Return lines: by task whether the run differs significantly from what else was measured, and from the largest
    class, with a warning if it is not better than that."""
    lines = []
    for task in tasks:
        folders = {whose: run / RESULTS / f"{task}{suffix}" for whose, suffix in _SUFFIXES.items() if whose != RUN}
        others = {whose: folder for whose, folder in folders.items() if folder.is_dir()}
        lines += [f"{_TASKS[task]}: {words}" for words in in_words(run / RESULTS / task, RUN, others)]
        if warning := against_largest_class(run / RESULTS / task).get("warning"):
            lines.append(f"warning: {_TASKS[task]}: {warning}")
    return lines
