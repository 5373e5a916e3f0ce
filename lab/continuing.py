"""Experiment: when does continuing from existing weights give better features than training from scratch for the same
time?

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab.continuing data/labelled --out runs/continuing
python -m lab.continuing data/labelled --minutes 20        # starts no run after 20 minutes; to resume, run it again

An MAE is trained on many images of one domain, the source. Then, MAEs are trained on few images of another domain, the
target, with the settings that `m3ae-fast pretrain` chooses. Some start from scratch, and the others continue from the
source's weights. All encoders are tested on held-out images of the target. The protocol is in lab/continuing.md.
table.md is written to --out after each run. Complete runs are not repeated. An incomplete run starts from the
beginning, so that the recorded CPU time covers one uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lab import recipe
from lab.markdown import table
from lab.recipe import SIDE, TEST, TRAIN, drawn
from lab.study import measure
from lab.study.measure import Encode
from lab.study.shards import LABELS, scaled, write_labelled
from lab.study.statistics import Seeds, accuracy, difference
from lab.trials import machine, perform_all
from m3ae_fast import checkpoint, train
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.config.evaluation import evaluation_config
from m3ae_fast.evaluation.probes import PROBES, Setting
from m3ae_fast.pretraining.automatic_settings import DatasetStatistics, Shards, model_sizes, peak_rate, settings
from m3ae_fast.pretraining.given_weights import given_weights
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.shards.statistics import stats
from m3ae_fast.weights.open_model import RANDOM, open_model

TARGET = ("t-shirt", "pullover", "dress", "coat", "shirt")  # classes of the target; the others are the related source
IMAGES = 2000  # number of training images of the target
RELATED, UNRELATED = "related", "unrelated"  # the sources: the other classes of Fashion-MNIST, and drawings in colour
# the model "tiny" of `pretrain`, made smaller
SIZES = {"image_size": 28, "patch_size": 7, "emb_dim": 64, "num_heads": 2, "dec_depth": 1}
BATCH = 64
SOURCE_STEPS, LENGTHS, LONG, SEEDS = 750, (50, 150, 450), 1200, 3
# settings of all runs that `pretrain` would derive from the available time, or that only affect output
FIXED = {"train.save_every": 1_000_000, "train.pictures": 0, "data.workers": 0, "train.compile": False}
TASKS = {"knn": "k-NN", "logistic": "logistic"}

SCRATCH, ON, FULL, LAYERED, FAR = "from scratch", "continued", "full rate", "layer decay", "unrelated source"
PIXELS, RANDOM_WEIGHTS = "raw pixels", "random weights"
STARTS = {ON: RELATED, FULL: RELATED, LAYERED: RELATED, FAR: UNRELATED}  # source of the initial weights by arm
SETTINGS = {FULL: {"optim.peak_lr": peak_rate(BATCH, SIZES["emb_dim"])}, LAYERED: {"optim.layer_decay": 0.75}}
DESCRIBED = {
    PIXELS: "raw pixels",
    RANDOM_WEIGHTS: "random weights",
    RELATED: "unchanged weights of the related source",
    UNRELATED: "unchanged weights of the unrelated source",
    SCRATCH: "from scratch",
    ON: "continued from the related source",
    FULL: "continued from the related source, full learning rate",
    LAYERED: "continued from the related source, layer decay 0.75",
    FAR: "continued from the unrelated source",
}


class Trial(NamedTuple):
    """An encoder: an arm, a source or a reference. The number of steps of an arm does not include the steps of its
    source."""

    arm: str
    steps: int
    seed: int  # determines the target's training images, the initial weights and the order of the samples

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.steps}-{self.seed}"

    @property
    def source(self) -> Trial | None:
        """Return the encoder whose weights initialise this one; None for random weights."""
        return Trial(STARTS[self.arm], SOURCE_STEPS, self.seed) if self.arm in STARTS else None


def plan(seeds: int) -> list[Trial]:
    """Return the encoders in the order of their training: the main comparison of all seeds comes first."""
    stages: list[list[tuple[str, int]]] = [
        [(RELATED, SOURCE_STEPS), (RANDOM_WEIGHTS, 0), *((arm, steps) for steps in LENGTHS for arm in (SCRATCH, ON))],
        [(SCRATCH, LONG)],
        [(PIXELS, 0)],
        [(ON, LONG)],
        [(UNRELATED, SOURCE_STEPS), *((FAR, steps) for steps in LENGTHS[1:])],
        [(LAYERED, steps) for steps in LENGTHS[1:]],
        [(FULL, steps) for steps in LENGTHS[1:]],
    ]
    return [Trial(arm, steps, seed) for stage in stages for seed in range(seeds) for arm, steps in stage]


def prepare(data: Path, folder: Path, seeds: int) -> None:
    """Write the labels and the shards, unless they exist: one shard for each source, one for the target's test images
    and, for each seed, one for the target's training images. Raises UserError if `data` has no shards."""
    if (folder / LABELS).exists() and (folder / f"{TRAIN}-{seeds - 1}.tar").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[tuple[str, bytes, int]]] = {RELATED: [], UNRELATED: []}
    target: dict[str, list[tuple[str, bytes, int]]] = {TRAIN: [], TEST: []}
    for name, picture in recipe.pictures(data):
        is_target = name.startswith("clothes") and picture.category in TARGET
        label = TARGET.index(picture.category) if is_target else -1
        row = (picture.key, scaled(picture.image, SIDE), label)
        if is_target:
            target[name.rpartition("-")[2]].append(row)
        elif name != f"clothes-{TEST}":
            sources[RELATED if name.startswith("clothes") else UNRELATED].append(row)
    for name, rows in sources.items():
        write_labelled(folder / f"{name}.tar", rows)
    write_labelled(folder / f"{TEST}.tar", target[TEST])
    for seed in range(seeds):
        chosen = sorted(target[TRAIN], key=lambda row: drawn(seed, row[0]))[:IMAGES]
        write_labelled(folder / f"{TRAIN}-{seed}.tar", chosen)
    labels = {key: {"emoji": key, "class": label} for rows in target.values() for key, _, label in rows}
    write_text_atomically(folder / LABELS, json.dumps(labels) + "\n")


class Laboratory:
    """A folder in which encoders are trained and tested. It stores which test images each encoder classifies
    correctly."""

    def __init__(self, out: Path) -> None:
        self.out = out

    @cached_property
    def labels(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.out / "shards" / LABELS).read_text(encoding="utf-8"))

    def shard(self, name: str) -> Path:
        return self.out / "shards" / f"{name}.tar"

    def run(self, trial: Trial) -> Path:
        return self.out / "runs" / trial.name

    def result(self, trial: Trial) -> Path:
        return self.out / "results" / f"{trial.name}.json"

    def perform(self, trial: Trial) -> bool:
        """Train an encoder if it needs training, test it, and store the result. Return False if it was stopped."""
        seconds = 0.0
        if trial.arm not in (PIXELS, RANDOM_WEIGHTS):
            shutil.rmtree(self.run(trial), ignore_errors=True)  # an interrupted run, whose CPU time is not known
            started = time.process_time()
            settings_file = self.out / "runs" / f"{trial.name}.json"
            write_text_atomically(settings_file, json.dumps(self.config(trial), indent=1))
            train.main(["--config", str(settings_file)])
            seconds = time.process_time() - started
            if trial.steps not in map(checkpoint.step_of, checkpoint.saved_steps(self.run(trial))):
                return False
        found = {"cpu_s": round(seconds, 2), "correct": self._test(trial)}
        write_text_atomically(self.result(trial), json.dumps(trial._asdict() | found) + "\n")
        return True

    def config(self, trial: Trial) -> dict[str, Any]:
        """Return the config that `pretrain` chooses for this number of steps, with or without --from. Weights to start
        from are written to the run folder."""
        overrides = [f"{name}={json.dumps(value)}" for name, value in {**FIXED, "run.seed": trial.seed}.items()]
        overrides += [f"{name}={json.dumps(value)}" for name, value in SETTINGS.get(trial.arm, {}).items()]
        if trial.source:
            overrides = [*given_weights(str(self.run(trial.source)), self.run(trial), []).overrides, *overrides]
        else:
            overrides = [*overrides, *(f"model.{name}={value}" for name, value in SIZES.items())]
        shard = self.shard(trial.arm if trial.arm in (RELATED, UNRELATED) else f"{TRAIN}-{trial.seed}")
        statistics = self._statistics(shard)
        (size, *_) = model_sizes(statistics, overrides)
        shards = Shards([str(shard)], [], [])
        chosen = settings(
            statistics, shards, self.run(trial), size, BATCH, trial.steps, "cls", overrides, evaluations=0
        )
        return chosen.model_dump(mode="json")

    def _statistics(self, shard: Path) -> DatasetStatistics:
        found = stats(str(shard), samples=IMAGES)
        return DatasetStatistics(found.of, 0, SIZES["image_size"], *found.mean_and_std(), 0, 0, 8)

    def _test(self, trial: Trial) -> dict[str, dict[str, int]]:
        """Return whether each test image is classified correctly, by task and key."""
        unused = {"train": [{"shards": "-"}]}  # required by the config
        given = {"run": {"dir": str(self.out), "seed": trial.seed}, "data": unused, "encode": {"batch": 256}}
        config, correct = evaluation_config(given, []), {}
        with joined_program() as session:
            encode = self._encode(trial, config, session)
            parts = []
            for name in (f"{TRAIN}-{trial.seed}", TEST):
                bank = encode([self.shard(name)], False, False)
                labels_N = torch.tensor([self.labels[key]["class"] for key in bank.keys])
                parts.append({0: replace(bank, labels_N=labels_N)})
            setting = Setting(config, len(TARGET), 1, trial.seed, session.ranks, session.heartbeats)
            for task in TASKS:
                found = PROBES[task].predict(*parts, setting)[0]
                correct[task] = dict(zip(found.keys, (int(value) for value in found.correct_N.tolist())))
        return correct

    def _encode(self, trial: Trial, config: Any, session: Session) -> Encode:
        if trial.arm == PIXELS:
            statistics = self._statistics(self.shard(f"{TRAIN}-{trial.seed}"))
            return measure.pixels(statistics.short_side, statistics.image_mean, statistics.image_std)
        name = str(self.run(trial))
        if trial.arm == RANDOM_WEIGHTS:
            name = f"{RANDOM}{self.run(Trial(RELATED, SOURCE_STEPS, trial.seed))}"
        return measure.encoder(open_model(name, text=False, seed=trial.seed).eval(), config, session)


class Result(NamedTuple):
    """Results of an arm for one number of steps."""

    correct: dict[str, Seeds]  # correctly classified test images, by task
    cpu_s: float  # CPU seconds of the training, mean over seeds


def collected(laboratory: Laboratory, seeds: int) -> dict[tuple[str, int], Result]:
    """Return the results so far, by arm and steps."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for trial in plan(seeds):
        if laboratory.result(trial).exists():
            row = json.loads(laboratory.result(trial).read_text(encoding="utf-8"))
            rows.setdefault((trial.arm, trial.steps), []).append(row)
    return {
        key: Result(
            {task: {r["seed"]: r["correct"][task] for r in own} for task in TASKS}, fmean(r["cpu_s"] for r in own)
        )
        for key, own in rows.items()
    }


def tables(found: Mapping[tuple[str, int], Result], labels: measure.Labels) -> str:
    """Return two Markdown tables: one compares accuracies for equal training time on the target, and the other compares
    them for equal total training time."""
    head = ["encoder", "steps", "CPU s", "seeds", *TASKS.values()]
    others = ("training from scratch", "the initial weights")
    head += [f"{title}, difference from {other}" for other in others for title in TASKS.values()]
    lines = [head]
    for arm, steps in sorted(found, key=_position):
        own, others = found[arm, steps], [(SCRATCH, steps), (STARTS.get(arm, arm), SOURCE_STEPS)]
        apart = [cell for key in others for cell in _apart(own, found.get(key) if arm in STARTS else None, labels)]
        lines.append([DESCRIBED[arm], f"{steps:,}", f"{own.cpu_s:.0f}", *_accuracies(own, labels), *apart])
    parts = [lines]
    last = LONG - SOURCE_STEPS
    if {(RELATED, SOURCE_STEPS), (ON, last), (SCRATCH, LONG)} <= found.keys():
        on, scratch = found[ON, last], found[SCRATCH, LONG]
        both = found[RELATED, SOURCE_STEPS].cpu_s + on.cpu_s
        rows = [
            [
                f"{SOURCE_STEPS:,} on the related source, then {last:,} on the target",
                f"{both:.0f}",
                *_accuracies(on, labels),
            ],
            [f"{LONG:,} on the target, from scratch", f"{scratch.cpu_s:.0f}", *_accuracies(scratch, labels)],
            ["difference", "", "", *_apart(on, scratch, labels)],
        ]
        parts.append([["training steps, for equal total time", "CPU s", "seeds", *TASKS.values()], *rows])
    return "\n\n".join(table(header, rows) for header, *rows in parts)


def _position(key: tuple[str, int]) -> tuple[int, int]:
    """Return the position of an encoder in the table: references first, then arms by length."""
    arm, steps = key
    return (steps if arm == SCRATCH or arm in STARTS else 0), [*DESCRIBED].index(arm)


def _accuracies(own: Result, labels: measure.Labels) -> list[str]:
    """Return the number of seeds, and the accuracy by task."""
    means = [accuracy(own.correct[task], labels) for task in TASKS]
    return [str(means[0].seeds), *(mean.percent() for mean in means)]


def _apart(one: Result, other: Result | None, labels: measure.Labels) -> list[str]:
    """Return the differences of the accuracies by task; dashes if there is nothing to compare with."""
    if other is None:
        return ["-"] * len(TASKS)
    apart = (difference(one.correct[task], other.correct[task], labels) for task in TASKS)
    return ["-" if each is None else each.percent("+") for each in apart]


def write(laboratory: Laboratory, seeds: int) -> str:
    """Write table.md and return its text."""
    head = f"{machine()}. Accuracy in %, mean ± standard error over test images and seeds; differences in points."
    text = f"{head}\n\n{tables(collected(laboratory, seeds), laboratory.labels)}\n"
    write_text_atomically(laboratory.out / "table.md", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.continuing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with fashion, twitter and google, written by lab.labelled"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/continuing"), help="output folder (default: runs/continuing)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"number of seeds (default: {SEEDS})")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no run after N minutes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    prepare(args.data, args.out / "shards", args.seeds)
    laboratory = Laboratory(args.out)
    if not perform_all(plan(args.seeds), laboratory, args.minutes, lambda: write(laboratory, args.seeds)):
        return 1
    print(write(laboratory, args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
