"""Pre-training of the encoders and their evaluation by `evaluate segment`. Results on disk determine what is
complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lab.segmentation.collage import CATEGORIES, FOREGROUND
from lab.study.run import Stopped
from m3ae_fast import checkpoint, train
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.evaluation.job import RESULT_FILE
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.weights.model_name import PIXELS, RANDOM

SETTINGS = Path(__file__).with_name("settings.json")
SEEDS = 3
LONGER = 4  # steps of the longer training, as a multiple of the steps of the others
Arm = Literal["pixels", "random", "mae", "m3ae", "longer"]
ARMS: tuple[Arm, ...] = ("mae", "m3ae", "random", "pixels")  # "random" and "pixels" use the settings of "mae"
TRAINED: tuple[Arm, ...] = ("mae", "m3ae", "longer")


class Test(NamedTuple):
    """A test of an encoder."""

    masks: str  # from collage.MASKS
    head: str  # value of segment.head


TESTS = (Test(FOREGROUND, "linear"), Test(FOREGROUND, "knn"), Test(CATEGORIES, "linear"))


class Trial(NamedTuple):
    """A test of an encoder with a seed, which determines the initial weights of encoder and head, and the order of the
    samples."""

    arm: Arm
    test: Test
    seed: int


def plan(seeds: int) -> Iterator[Trial]:
    """Yield the trials in the order of execution: seed by seed, so that an unfinished study has all encoders for the
    first seeds. The longer training comes last."""
    stages: tuple[tuple[Arm, ...], ...] = (ARMS, ("longer",))
    for arms in stages:
        for seed in range(seeds):
            for arm in arms:
                for test in TESTS:
                    yield Trial(arm, test, seed)


@dataclass(frozen=True)
class Study:
    """Paths and settings of the study."""

    out: Path
    shards: Path  # see `collage.prepare`
    settings: dict[str, Any]  # `train`: a config; `evaluate`: overrides of the settings for evaluation

    def run(self, arm: Arm, seed: int) -> Path:
        return self.out / "runs" / f"{arm}-{seed}"

    def folder(self, trial: Trial) -> Path:
        """Return the folder of a trial's result."""
        return self.out / "results" / f"{trial.arm}-{trial.test.masks}-{trial.test.head}-{trial.seed}"

    def done(self, trial: Trial) -> bool:
        return (self.folder(trial) / RESULT_FILE).exists()

    def perform(self, trial: Trial) -> None:
        """Train the encoder, unless it has been trained, and test it. Raises Stopped if a program was stopped."""
        trained: Arm = trial.arm if trial.arm in TRAINED else "mae"
        prefix = {"random": RANDOM, "pixels": PIXELS}.get(trial.arm, "")
        self._train(trained, trial.seed)
        train, val = (f"{self.shards / trial.test.masks}/{split}-*.tar" for split in ("train", "val"))
        chosen = {**self.settings["evaluate"], "segment.head": trial.test.head, "run.seed": trial.seed}
        result = evaluate(
            "segment",
            f"{prefix}{self.run(trained, trial.seed)}",
            train=train,
            val=val,
            out=self.folder(trial),
            baselines=False,  # they are trials of the study
            overrides=[f"{name}={value}" for name, value in chosen.items()],
        )
        if result is None:
            raise Stopped

    def _train(self, arm: Arm, seed: int) -> None:
        run, config = self.run(arm, seed), self.config(arm, seed)
        steps = config["train"]["steps"]
        if steps in map(checkpoint.step_of, checkpoint.saved_steps(run)):
            return
        file = run.with_suffix(".json")
        write_text_atomically(file, json.dumps(config, indent=1))
        train.main(["--config", str(file), "--resume", "auto"])
        if steps not in map(checkpoint.step_of, checkpoint.saved_steps(run)):
            raise Stopped

    def config(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the config of a training, on the images of the shards and, for M3AE, their captions."""
        config = json.loads(json.dumps(self.settings["train"]))
        config["run"] = {"dir": str(self.run(arm, seed)), "seed": seed}
        modality = "auto" if arm == "m3ae" else "image"
        config["data"]["train"] = [{"shards": f"{self.shards / CATEGORIES}/train-*.tar", "modality": modality}]
        config["train"]["steps"] *= LONGER if arm == "longer" else 1
        if arm != "m3ae":
            config["model"]["vocab_size"], config["data"]["tokenizer"] = 0, None
        return config
