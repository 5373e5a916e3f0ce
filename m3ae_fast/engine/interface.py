"""The interfaces of engines: `Engine` has what the trainer and checkpoints use, and `ModelEngine` adds evaluation.

A state consists of tensors by parameter name. Each rank saves and loads flat slices of them, so that checkpoints do not
depend on ZeRO stages or on the layout of optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.engine.fragments import Fragments
from m3ae_fast.engine.optimizer import Kinds

# Reader of a slice of a state's tensor: name, first element, number of elements -> float32, 1-D
Read = Callable[[str, int, int], Tensor]


class StepLosses(Protocol):
    """The losses of a batch: a NamedTuple of 0-d tensors. Only `loss` is differentiable; the others are detached."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def _fields(self) -> tuple[str, ...]: ...


class Engine(Protocol):
    """An engine that takes training steps, and saves and loads their state."""

    model: nn.Module
    # called by `step` before it changes the state; other threads may read the state until then
    before_update: Callable[[], None]
    kinds: Kinds  # kinds of optimiser state, which are prefixes in the keys of `Fragments`

    def step(self, batches: Sequence[PackedBatch], counts: Any, lr: float) -> tuple[list[Any], Tensor]:
        """Run forward, backward and update; gradients are summed over micro-batches and averaged over ranks.

        Args:
            batches: this rank's micro-batches, on its device.
            counts: denominators of the mean losses, by which the summed losses of each micro-batch are divided. They
                are the numbers of images and captions in the step, or of the patches and text tokens that carry loss,
                divided by the number of ranks. For a classifier, there is one denominator: the number of samples in
                the step, divided by the number of ranks.
            lr: learning rate of the update; it is multiplied by the `lr_scale` of a parameter group that has one.

        Returns:
            The micro-batches' StepLosses, and the global gradient norm before clipping, a 0-d tensor; it is not finite
                if a gradient is not finite.
        """

    def fragments(self) -> Fragments:
        """Return this rank's part of the state, as views that the next update overwrites. The parts of all ranks
        together contain every tensor exactly once. There is no synchronisation between ranks, and forward and backward
        passes may run at the same time."""

    def load_state(self, step: int, read: Read) -> None:
        """Load, with `read`, the state that training had after `step` updates. Every rank must call it, and reads only
        the elements that it holds."""


class ModelEngine(Engine, Protocol):
    """An engine that trains a module, which maps (batch, counts) to StepLosses, and evaluates it."""

    name: str  # for the log: the library that trains, and the ZeRO stage
    optimizer_name: str
    memory: str  # log line on decisions that depend on the memory; "" if there are none

    def evaluate(self, batch: PackedBatch) -> Any:
        """Return the module's output for one batch, without gradients and stochastic depth."""

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Return the complete weights (kind "model"), or the complete optimiser state of one of `kinds`, by parameter
        name: float32, on the CPU, on every rank. Every rank must call it."""
