"""Measure the cost of reaching a given quality of the representation with several recipes. The protocol is in
lab/race/README.md.

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab.race data/labelled --out runs/race
python -m lab.race data/labelled --minutes 40 --final-seeds 0     # only runs of the shortest length

Each run is trained with m3ae_fast.train and tested. The time of the tests is not counted. race.json, race.png and
README.md are written after each run. Completed runs are not repeated: if the program is stopped, run it again. To
continue on another machine, copy the folder of --results to it and pass it as --results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from lab.race import report
from lab.race.plan import ARMS, FINAL_SEEDS, SEEDS, USUAL, Overrides, Trial, finetuned, race, tune, tuned_as, usual
from lab.race.run import FINETUNED, SETTINGS, TESTS, Race
from lab.study.run import Stopped
from lab.study.shards import LABELS, prepare
from lab.trials import log
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.config.load import apply_override

SIDE = 36  # side of an emoji in pixels, 1.5 times that of the model's images


class TimeIsOver(Exception):
    """Raised if the time limit has passed, so that no further run may begin."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(
        prog="python -m lab.race", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DATA", help="folder with fashion, twitter and google, written by lab.labelled")
    add("--out", type=Path, default=Path("runs/race"), help="output folder for the runs (default: runs/race)")
    add("--results", type=Path, metavar="DIR", help="output folder for the tables and the plot (default: --out)")
    add("--minutes", type=float, metavar="N", help="start no run after N minutes")
    add("--data", nargs="+", choices=TESTS, default=[*TESTS], help="datasets (default: all)")
    add(
        "--sizes", nargs="+", choices=settings["sizes"], default=[*settings["sizes"]], help="model sizes (default: all)"
    )
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="recipes (default: all)")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="STEPS",
        help="lengths of runs in steps (default: all in settings.json)",
    )
    add(
        "--tune",
        nargs="*",
        choices=settings["tried"],
        default=[*settings["tried"]],
        help="settings to tune (default: all)",
    )
    add(
        "--seeds", type=int, default=SEEDS, help=f"number of seeds per recipe at the shortest length (default: {SEEDS})"
    )
    add("--final-seeds", type=int, default=FINAL_SEEDS, help=f"number of seeds at all lengths (default: {FINAL_SEEDS})")
    add(
        "--finetune",
        type=int,
        default=SEEDS,
        metavar="N",
        help=f"number of seeds whose encoders are fine-tuned (default: {SEEDS})",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of settings.json")
    return parser.parse_args(argv)


class Runner:
    """Executes runs that are not complete, and writes the report after each of them."""

    def __init__(self, race: Race, folder: Path, minutes: float | None, labels: dict[str, dict[str, str]]) -> None:
        self.race, self.folder, self.labels = race, folder, labels
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.asked: dict[Trial, None] = {}  # all requested runs, complete or not

    def perform(self, trial: Trial) -> None:
        """Execute a run unless it is complete, and write the report. Raises TimeIsOver if a run would begin after the
        time limit, and Stopped if a run was stopped."""
        self.asked[trial] = None
        if not self.race.done(trial):
            self._execute(self.race.perform, trial)

    def finetune(self, trial: Trial) -> None:
        """Fine-tune the encoder of a run, like `perform`."""
        if not self.race.finetuning(trial).exists():
            self._execute(self.race.finetune, trial)

    def _execute(self, action: Callable[[Trial], None], trial: Trial) -> None:
        if self.until is not None and time.monotonic() > self.until:
            raise TimeIsOver
        log(f"{action.__name__} {trial.name}")
        action(trial)
        self.write()

    def accuracy(self, trial: Trial) -> float:
        self.perform(trial)
        return self.race.accuracy(trial)

    def write(self) -> None:
        head: dict[str, Any] = {"about": results.about(), "settings": self.race.settings}
        report.save(self.folder, head, self.race.everything(), self.race.finetuned(), self.labels)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    for override in args.set:
        apply_override(settings, override)
    if unknown := {*(args.lengths or ())} - {*settings["lengths"]}:
        raise UserError(
            f"--lengths {min(unknown)}: is not one of {settings['lengths']}; add it with --set lengths=[...]"
        )
    shards = args.out / "shards"
    prepare(args.folder, shards, SIDE)
    labels = json.loads((shards / LABELS).read_text(encoding="utf-8"))
    folder = args.results or args.out
    running = Race(args.out / "runs", shards, settings)
    running.adopt(*report.read_answers(folder, settings))
    runner = Runner(running, folder, args.minutes, labels)
    try:
        for data in args.data:
            for size in args.sizes:
                _race(runner, args, data, size)
    except TimeIsOver:
        log(f"{args.minutes:g} minutes are over; run the same command again to continue")
    except Stopped:
        log("stopped; run the same command again to continue")
        return 1
    runner.write()
    log(f"see {folder / report.PAGE}")
    return 0


def _race(runner: Runner, args: argparse.Namespace, data: str, size: str) -> None:
    """Tune and execute the selected runs of one model size on one dataset."""
    settings, known = runner.race.settings, {USUAL: usual(runner.race.settings["tried"])}

    def tuned(arm: str) -> Overrides:
        if arm not in known:
            start = Trial(data, size, arm, settings["lengths"][0], 0)
            known[arm] = tune(start, settings["tried"], args.tune, runner.accuracy)
        return known[arm]

    def with_settings(trial: Trial) -> Trial:
        untuned = trial.trained and not trial.tuned
        return replace(trial, tuned=tuned(tuned_as(trial.arm))) if untuned else trial

    selected, lengths, target = {*(args.lengths or settings["lengths"])}, settings["lengths"], settings["target"]
    for trial in race(data, size, lengths, target, settings["tried"], args.seeds, args.final_seeds):
        if trial.trained and not (trial.arm in args.arms and trial.steps in selected):
            continue
        runner.perform(with_settings(trial))
    for trial in finetuned(data, size, lengths[0], target, args.finetune) if data == FINETUNED else ():
        runner.finetune(with_settings(trial))


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
