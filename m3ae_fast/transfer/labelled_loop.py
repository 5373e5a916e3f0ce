"""The parts of a training loop over labelled samples that do not depend on what is trained.

Shapes: N held-out samples, K best classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast.data.labels import Classes
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.loop import Loop
from m3ae_fast.engine.run_log import read_metrics
from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.transfer.figures import draw_confusion, draw_training


class ClassLosses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate."""

    loss: Tensor
    accuracy: Tensor  # by the likeliest class of the mixed labels


@dataclass(kw_only=True)
class LabelledLoop(Loop):
    """Counts samples, and shows what was learnt."""

    notes: list[str]  # on what a resumed run does otherwise
    seen: float = 0.0  # samples since `since`
    waited: float = 0.0  # seconds, likewise
    since: float = field(default_factory=time.perf_counter)
    best_NK: Tensor = field(default_factory=lambda: torch.empty(0))  # see `best_classes`: the last evaluation's
    labels_N: Tensor = field(default_factory=lambda: torch.empty(0))

    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        return sum(len(batch.keys) for batch in batches), sum(len(batch.skipped) for batch in batches)

    def agree(self, fed: Fed) -> float | None:
        """Samples of the next step, per rank; None where a rank asks to stop or has failed.

        Raises:
            UserError: too many samples cannot be used.
        """
        sums = self.agreed(fed)
        if sums is None:
            return None
        samples, skipped = sums
        self.bad.count(int(samples + skipped), int(skipped))
        self.seen += samples
        self.waited += fed.waited
        return max(samples, 1.0) / self.ranks.world

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        rates = {"samples_per_s": self.seen / seconds, "data_wait": self.waited / seconds}
        self.seen, self.waited, self.since = 0.0, 0.0, time.perf_counter()
        return rates

    def draw(self, classes: Classes) -> None:
        """Pictures of the run and of its last evaluation. Every rank must call it."""

        def draw() -> None:
            folder = self.run.dir
            draw_training(folder / "training.png", read_metrics(folder), self.schedule.steps_per_epoch)
            draw_confusion(folder / "confusion.png", self.labels_N, self.best_NK[:, 0], classes)

        self.ranks.on_main(draw)
