"""The training loop that the linear probe and fine-tuning have in common.

Shapes: N held-out samples, K best classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.data.labels import Classes
from m3ae_fast.pictures.figures import draw_confusion, draw_training
from m3ae_fast.run.loop import Loop
from m3ae_fast.run.run_log import read_metrics


class ClassLosses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate."""

    loss: Tensor
    accuracy: Tensor  # by the likeliest class of the mixed labels


@dataclass(kw_only=True)
class LabelledLoop(Loop):
    """Counts samples, and shows what was learnt."""

    notes: list[str]  # on what a resumed run does otherwise
    classes: Classes

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen, self.waited, self.since = 0.0, 0.0, time.perf_counter()  # samples and seconds since then
        self.best_NK, self.labels_N = torch.empty(0), torch.empty(0)  # see `best_classes`: the last evaluation's

    def say_first(self, text: str) -> None:
        """Say what the run is, and the notes on it."""
        self.log.say("\n".join([text, *(f"note: {note}" for note in self.notes)]))

    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        return sum(len(batch.keys) for batch in batches), sum(len(batch.skipped) for batch in batches)

    def counted(self, sums: list[float], waited: float) -> float:
        samples, skipped = sums
        self.bad.count(int(samples + skipped), int(skipped))
        self.seen += samples
        self.waited += waited
        return max(samples, 1.0) / self.ranks.world

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        rates = {"samples_per_s": self.seen / seconds, "data_wait": self.waited / seconds}
        self.seen, self.waited, self.since = 0.0, 0.0, time.perf_counter()
        return rates

    def draw(self) -> None:
        """Draw the run and its last evaluation, on the main rank."""
        folder = self.run.dir
        draw_training(folder / "training.png", read_metrics(folder), self.schedule.steps_per_epoch)
        draw_confusion(folder / "confusion.png", self.labels_N, self.best_NK[:, 0], self.classes)
