"""Detection of losses and gradient norms that are not finite, without synchronising with the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.engine.interface import StepLosses


class NotFinite(UserError):
    """Raised if a step's loss or gradient norm is not finite."""

    def __init__(self, what: str, advice: str, batch: int) -> None:
        """Create the error. `what`: description of the non-finite value; `advice`: suggestion for the user; `batch`:
        the step's batch in the training stream."""
        super().__init__(f"{what}. {advice}")
        self.what, self.batch = what, batch


_LAG = 2  # number of steps that may be in flight on the GPU before the host waits for their loss


class LossWatch:
    """Record of the losses, gradient norms and sample keys of recent steps until the values are known to be finite."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self._bad = ""
        self.bad_step: int | None = None  # first step whose loss or gradient norm was not finite
        self.finite_through = 0  # last step that is known to have been finite

    def add(self, step: int, keys: list[str], losses: Sequence[StepLosses], grad_norm: Tensor) -> None:
        """Record the losses and gradient norm of a step. `keys`: keys of its samples."""
        device = losses[0].loss.device
        stacked = torch.stack([*(part.loss.detach() for part in losses), grad_norm.detach().to(device).float()])
        event = None
        if stacked.is_cuda:
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, keys, stacked, event))

    def failed(self) -> bool:
        """Return whether any step whose loss is known by now was not finite."""
        self._look(wait=False)
        return bool(self._bad)

    def first_bad(self) -> str:
        """Return a description of the first non-finite step; "" if there is none. Waits for the GPU."""
        self._look(wait=True)
        return self._bad

    def _look(self, wait: bool) -> None:
        while self._pending and not self._bad:
            step, keys, values, event = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= _LAG:
                    return
                event.synchronize()
            self._pending.popleft()
            if values.isfinite().all():
                self.finite_through = step
            else:
                self.bad_step = step
                what = "gradient norm" if values[:-1].isfinite().all() else "loss"
                shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                self._bad = f"the {what} of step {step} is not finite; samples: {shown}"
