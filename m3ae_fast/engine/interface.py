"""The interface between a training loop and its engine: steps over micro-batches, outputs without training, its state.

A state consists of tensors by parameter name, of which each rank gives and takes flat pieces, so that a checkpoint
knows nothing of ZeRO stages or optimisers' layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.engine.fragments import Fragments
from m3ae_fast.engine.optimizer import Kinds

Read = Callable[[str, int, int], Tensor]  # name in a state, first element, number of elements -> float32, 1-D


class StepLosses(Protocol):
    """A NamedTuple of 0-d tensors; `loss` is what to differentiate, the others are detached."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def _fields(self) -> tuple[str, ...]: ...


class Engine(Protocol):
    """Trains a module that gives StepLosses for (batch, counts)."""

    model: nn.Module
    optimizer_name: str
    memory: str  # what its memory has decided, for a log; "": nothing
    before_update: Callable[[], None]  # called before each change of the state, which may be read until then
    kinds: Kinds  # of optimiser state: in keys of `Fragments` before the parameter's name

    def step(self, batches: Sequence[PackedBatch], counts: Any, lr: float) -> tuple[list[Any], Tensor]:
        """Run forward, backward and update; gradients are summed over micro-batches and averaged over ranks.

        Args:
            batches: this rank's micro-batches, on its device.
            counts: denominators of the step's mean losses (numbers of images and captions, or of tokens), divided by
                the number of ranks; the summed losses of each micro-batch are divided by them.
            lr: learning rate of the update, times a parameter group's `lr_scale` where it has one.

        Returns:
            The micro-batches' StepLosses, and the global gradient norm before clipping.
        """

    def evaluate(self, batch: PackedBatch) -> Any:
        """Return the module's output for one batch, without gradients and dropout."""

    def fragments(self) -> Fragments:
        """Return this rank's part of the state, as views that the next update overwrites. The parts of all ranks
        together contain every tensor exactly once. There is no synchronisation between ranks, and forward and backward
        passes may run at the same time."""

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Return "model", the weights, or one of `kinds` by the names of the parameters that have it, whole on every
        rank: float32, on the CPU. Every rank must call it."""

    def load_state(self, step: int, read: Read) -> None:
        """Load a state as of `step` updates. Each rank reads the elements that it keeps."""
