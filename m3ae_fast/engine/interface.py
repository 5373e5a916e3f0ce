"""The interface between a training loop and its engine: steps over micro-batches, outputs without training, its state.

A state consists of whole tensors by parameter name, so that a checkpoint knows nothing of ranks, ZeRO stages or
optimisers' layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch

# "model/NAME" and "KIND/NAME" for the engine's `kinds`: with AdamW "exp_avg", "exp_avg_sq" and, with train.ema, "ema"
# -> on the CPU, float32
State = dict[str, Tensor]


class StepLosses(Protocol):
    """A NamedTuple of 0-d tensors; `loss` is what to differentiate, the others are detached."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def _fields(self) -> tuple[str, ...]: ...


class Engine(Protocol):
    """Of a module that in training gives StepLosses for (batch, counts)."""

    model: nn.Module
    optimizer_name: str
    kinds: tuple[str, ...]  # of optimiser state: keys of `State` before the parameter's name

    def step(self, batches: Sequence[PackedBatch], counts: Any, lr: float) -> tuple[list[Any], Tensor]:
        """Run forward, backward and update; gradients are summed over micro-batches and averaged over ranks.

        Args:
            batches: this rank's micro-batches, on its device.
            counts: what the losses of the whole step are means over, per rank: each micro-batch's are divided by it.
            lr: learning rate of the update, times a parameter group's `lr_scale` where it has one.

        Returns:
            The micro-batches' StepLosses, and the global gradient norm before clipping.
        """

    def evaluate(self, batch: PackedBatch) -> Any:
        """Return the module's output for one batch, without gradients and dropout."""

    def state(self) -> State | None:
        """Return whole tensors on rank 0, None elsewhere. Every rank must call it."""

    def average(self) -> dict[str, Tensor]:
        """Return the moving average of the weights by parameter name, whole on every rank: float32, on the CPU. Every
        rank must call it, and only if the engine keeps one."""

    def load_state(self, step: int, get: Callable[[str], Tensor]) -> None:
        """Load a state as of `step` updates; `get` gives its tensors by name, on every rank in the same order."""
