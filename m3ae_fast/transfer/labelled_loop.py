"""The parts of a training loop over labelled samples that do not depend on what is trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.loop import Loop
from m3ae_fast.model.batch import PackedBatch


class ClassLosses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate."""

    loss: Tensor
    accuracy: Tensor  # by the likeliest class of the mixed labels


@dataclass(kw_only=True)
class LabelledLoop(Loop):
    """Counts samples."""

    seen: float = 0.0  # samples since `since`
    waited: float = 0.0  # seconds, likewise
    since: float = field(default_factory=time.perf_counter)

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
