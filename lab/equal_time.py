"""Experiment: which recipe should `m3ae-fast pretrain` choose, if all recipes have the same time?

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab.equal_time data/labelled --out runs/equal-time
python -m lab.equal_time data/labelled --minutes 20        # starts no run after 20 minutes; to resume, run it again

Each run is a call of `pretrain` with the same --hours, which chooses the model and the number of steps. The features of
the run are tested on held-out images. The protocol is in lab/equal_time.md. table.md is written to --out after each
run. Complete runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.markdown import table
from lab.study.measure import correct_in
from lab.study.statistics import Seeds, accuracy, difference
from lab.trials import machine, perform_all
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.config import load_config
from m3ae_fast.evaluation.job import RESULT_FILE
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.pretraining.recipes import Recipe
from m3ae_fast.pretraining.stages import CONFIG, pretrain
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.weights.model_name import PIXELS, RANDOM

HOURS, SEEDS = 0.15, 2
OFFICIAL, FAST, MUON = "official", "fast", "Muon"
# the recipe of `pretrain`, and overrides; the other settings are those that `pretrain` chooses
RECIPES: dict[str, tuple[Recipe, tuple[str, ...]]] = {
    OFFICIAL: ("official", ()),
    FAST: ("fast", ()),
    MUON: ("official", ("optim.name=muon",)),
}
REFERENCES = {PIXELS: "raw pixels", RANDOM: "random weights"}  # by prefix of the model's name
TASKS = {"knn": "k-NN", "logistic": "logistic"}


class Dataset(NamedTuple):
    """Shards of a dataset, as patterns relative to the folder of the labelled data."""

    train: str
    held_out: str
    probed: str  # the training shards on which probes are trained


DATASETS = {
    "Fashion-MNIST": Dataset("fashion/train-*.tar", "fashion/val-*.tar", "fashion/train-0000[0-4].tar"),
    "emoji": Dataset("{twitter,google}/train-*.tar", "{twitter,google}/val-*.tar", "{twitter,google}/train-*.tar"),
}


class Trial(NamedTuple):
    """A run."""

    data: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.recipe}-{self.seed}"


def plan(seeds: int) -> list[Trial]:
    """Return the runs in the order of execution: those of the two main recipes come first."""
    main = [Trial(data, recipe, seed) for seed in range(seeds) for data in DATASETS for recipe in (OFFICIAL, FAST)]
    others = [Trial(data, MUON, seed) for seed in range(seeds) for data in DATASETS]
    return main + others


class Laboratory:
    """A folder in which models are trained and tested."""

    def __init__(self, data: Path, out: Path, hours: float) -> None:
        self.data, self.out, self.hours = data, out, hours

    def run(self, trial: Trial) -> Path:
        return self.out / "runs" / trial.name

    def result(self, trial: Trial) -> Path:
        return self.out / "results" / f"{trial.name}.json"

    def perform(self, trial: Trial) -> bool:
        """Train and test a model, and store the result. Return False if it was stopped."""
        dataset, (recipe, overrides) = DATASETS[trial.data], RECIPES[trial.recipe]
        outcome = pretrain(
            str(self.data / dataset.train),
            self.run(trial),
            hours=self.hours,
            val=[str(self.data / dataset.held_out)],
            recipe=recipe,
            overrides=[*overrides, f"run.seed={trial.seed}", "train.probe=null"],
        )
        if not outcome.finished or (correct := self._test(trial, "")) is None:
            return False
        found: dict[str, Any] = {"correct": correct, "references": {}, **self._described(trial)}
        for prefix, title in REFERENCES.items() if (trial.recipe, trial.seed) == (OFFICIAL, 0) else ():
            if (correct := self._test(trial, prefix)) is None:
                return False
            found["references"][title] = correct
        write_text_atomically(self.result(trial), json.dumps(trial._asdict() | found) + "\n")
        return True

    def _test(self, trial: Trial, prefix: str) -> dict[str, dict[str, int]] | None:
        """Return whether each held-out image is classified correctly, 0 or 1 by task and key; None if the evaluation
        was stopped. `prefix`: prefix of the model's name, which selects a reference; "" for the trained model."""
        dataset, found = DATASETS[trial.data], {}
        for task in TASKS:
            folder = self.out / "tests" / f"{trial.name}-{prefix.rstrip(':')}-{task}"
            if not (folder / RESULT_FILE).exists():
                result = evaluate(
                    task,
                    f"{prefix}{self.run(trial)}",
                    train=str(self.data / dataset.probed),
                    val=str(self.data / dataset.held_out),
                    out=folder,
                    modality="image",
                    baselines=False,
                    overrides=[f"run.seed={trial.seed}"],
                )
                if result is None:
                    return None
            found[task] = correct_in(folder)
        return found

    def _described(self, trial: Trial) -> dict[str, Any]:
        """Return the model and the training length of a run."""
        config, lines = load_config(self.run(trial) / CONFIG, []), read_metrics(self.run(trial))
        steps = max(line["step"] for line in lines)
        return {
            "width": config.model.emb_dim,
            "steps": steps,
            "samples": steps * config.train.global_batch,
            "batch": config.train.global_batch,
        }

    def complete(self, seeds: int) -> list[dict[str, Any]]:
        """Return the results so far."""
        files = [self.result(trial) for trial in plan(seeds)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table for each dataset: accuracies by recipe, and their differences from the official
    recipe."""
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        by_recipe = {name: [row for row in rows if (row["data"], row["recipe"]) == (data, name)] for name in RECIPES}
        official = by_recipe[OFFICIAL]
        head = [data, "seeds", "width", "samples per step", "steps", *TASKS.values()]
        head += [f"{title}, difference from `{OFFICIAL}`" for title in TASKS.values()]
        lines = []
        for title, correct in ((title, each) for row in official for title, each in row["references"].items()):
            accuracies = [_accuracy([{"seed": 0, "correct": correct}], task) for task in TASKS]
            lines.append([title, *["-"] * 4, *accuracies, *["-"] * len(TASKS)])
        for name, own in by_recipe.items():
            if own:
                facts = [_each(own, key) for key in ("width", "batch", "steps")]
                apart = [_difference(own, official, task) for task in TASKS] if name != OFFICIAL else ["-", "-"]
                lines.append([name, str(len(own)), *facts, *(_accuracy(own, task) for task in TASKS), *apart])
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def _each(rows: Sequence[dict[str, Any]], key: str) -> str:
    """Return the values of all seeds; a single value if all are equal."""
    values = [f"{row[key]:,}" for row in rows]
    return values[0] if len({*values}) == 1 else "; ".join(values)


def _seeds(rows: Sequence[dict[str, Any]], task: str) -> Seeds:
    return {row["seed"]: row["correct"][task] for row in rows}


def _labels(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the group of each image: the images of both vendors of an emoji have one key and count as one sample."""
    return {key: {"emoji": key.rpartition("/")[2]} for row in rows for own in row["correct"].values() for key in own}


def _accuracy(rows: Sequence[dict[str, Any]], task: str) -> str:
    return accuracy(_seeds(rows, task), _labels(rows)).percent()


def _difference(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], task: str) -> str:
    apart = difference(_seeds(rows, task), _seeds(others, task), _labels(rows))
    return "-" if apart is None else apart.percent("+")


def write(laboratory: Laboratory, seeds: int) -> str:
    """Write table.md and return its text."""
    head = (
        f"{machine()}. `pretrain --hours {laboratory.hours:g}`. Accuracy in %, mean ± standard error over test images "
    )
    head += "and seeds; differences in points."
    text = f"{head}\n\n{tables(laboratory.complete(seeds))}\n"
    write_text_atomically(laboratory.out / "table.md", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.equal_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with fashion, twitter and google, written by lab.labelled"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/equal-time"), help="output folder (default: runs/equal-time)"
    )
    parser.add_argument("--hours", type=float, default=HOURS, help=f"hours for each run (default: {HOURS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"number of seeds (default: {SEEDS})")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no run after N minutes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    laboratory = Laboratory(args.data, args.out, args.hours)
    if not perform_all(plan(args.seeds), laboratory, args.minutes, lambda: write(laboratory, args.seeds)):
        return 1
    print(write(laboratory, args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
