"""What the trainer asks of an engine: optimiser steps over micro-batches, losses without training, and its state.

A state speaks of whole tensors by parameter name, so that a checkpoint knows nothing of ranks, ZeRO stages or
optimisers' layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.m3ae import M3AE, Losses

# "model/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" and, with train.ema, "ema/NAME" -> float32 on the CPU
State = dict[str, Tensor]


class Engine(Protocol):
    model: M3AE
    optimizer_name: str

    def step(self, batches: Sequence[PackedBatch], counts: LossCounts, lr: float) -> tuple[list[Losses], Tensor]:
        """Forward, backward and update; gradients are summed over micro-batches and averaged over ranks.

        Args:
            batches: this rank's micro-batches, on its device.
            counts: what the losses of the whole step are means over, per rank: each micro-batch's are divided by it.
            lr: learning rate of the update.

        Returns:
            The micro-batches' losses, and the global gradient norm before clipping.
        """

    def evaluate(self, batch: PackedBatch) -> Losses:
        """Losses of one batch, without gradients and dropout."""

    def state(self) -> State | None:
        """Whole tensors on rank 0, None elsewhere. Every rank must call it."""

    def load_state(self, step: int, get: Callable[[str], Tensor]) -> None:
        """Take over a state after `step` updates; `get` gives its tensors by name, on every rank in the same order."""
