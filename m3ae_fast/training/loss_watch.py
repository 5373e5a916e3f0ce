"""Detection of losses and gradient norms that are not finite, without waiting for the GPU's latest steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast.engine.interface import StepLosses

LAG = 2  # number of steps that may be in flight on the GPU before the host waits for their loss


class LossWatch:
    """Record of the losses, gradient norms and sample keys of recent steps. An entry is kept until its values are known
    to be finite."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self._bad = ""
        self.bad_step: int | None = None  # first step with a non-finite value
        self.finite_through = 0  # last step whose values are known to be finite

    def add(self, step: int, keys: list[str], losses: Sequence[StepLosses], grad_norm: Tensor) -> None:
        """Record the losses and gradient norm of a step. `keys`: keys of the step's samples; `losses`: the losses of
        its micro-batches; `grad_norm`: a 0-d tensor."""
        device = losses[0].loss.device
        stacked = torch.stack([*(part.loss.detach() for part in losses), grad_norm.detach().to(device).float()])
        event = None
        if stacked.is_cuda:
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, keys, stacked, event))

    def failed(self) -> bool:
        """Return whether any step whose values are known by now had a non-finite value."""
        self._look(wait=False)
        return bool(self._bad)

    def first_bad(self) -> str:
        """Return a description of the first non-finite value; "" if there is none. Waits for the GPU."""
        self._look(wait=True)
        return self._bad

    def _look(self, wait: bool) -> None:
        while self._pending and not self._bad:
            step, keys, values, event = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= LAG:
                    return
                event.synchronize()
            self._pending.popleft()
            if values.isfinite().all():
                self.finite_through = step
            else:
                what = "gradient norm" if values[:-1].isfinite().all() else "loss"
                shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                self.bad_step, self._bad = step, f"the {what} of step {step} is not finite; samples: {shown}"
