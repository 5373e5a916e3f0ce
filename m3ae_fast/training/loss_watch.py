"""Detection of loss spikes and of values that are not finite, without waiting for the GPU's latest steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.engine.interface import StepLosses


class Diverged(UserError):
    """Raised if a step's loss or gradient norm is not finite, or if its loss is a spike."""

    def __init__(self, what: str, advice: str, batch: int) -> None:
        """Create the error. `what`: description of the value; `advice`: suggestion for the user; `batch`:
        the step's batch in the training stream."""
        super().__init__(f"{what}. {advice}")
        self.what, self.batch = what, batch


LAG = 2  # number of steps that may be in flight on the GPU before the host waits for their loss
WINDOW = 128  # number of earlier losses with which a loss is compared, as in OLMo-core's skip-step optimisers


class Spikes:
    """Detection of losses that are far above recent losses, by the criterion of OLMo-core's skip-step optimisers."""

    def __init__(self, threshold: float, recent: Sequence[float] = ()) -> None:
        """Create the detector. `threshold`: number of standard deviations above the mean; `recent`: losses of the
        steps before the first one, from the oldest to the latest."""
        self.threshold = threshold
        self.recent = deque(recent, maxlen=WINDOW)

    def add(self, loss: float) -> str:
        """Return a description of the loss if it is a spike. Otherwise, add it to the recent losses and return ""."""
        if len(self.recent) == WINDOW:
            mean, deviation = np.mean(self.recent), np.std(self.recent)
            if loss > mean + self.threshold * deviation:
                return f"{loss:.4g}, but the previous {WINDOW} losses were {mean:.4g} ± {deviation:.2g}"
        self.recent.append(loss)
        return ""


class LossWatch:
    """Record of the losses, gradient norms and sample keys of recent steps. An entry is kept until its values are known
    to be finite and, if `spikes` is given, until its loss has been compared with earlier losses."""

    def __init__(self, spikes: Spikes | None = None) -> None:
        self.spikes = spikes
        self._pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self._finite: deque[tuple[int, list[str], float]] = deque()  # steps to compare, with this rank's losses
        self._bad = ""
        self.bad_step: int | None = None  # first step with a non-finite value or a loss spike
        self.finite_through = 0  # last step whose values are known to be finite

    def add(self, step: int, keys: list[str], losses: Sequence[StepLosses], grad_norm: Tensor) -> None:
        """Record the losses and gradient norm of a step. `keys`: keys of its samples; `losses`: those of its
        micro-batches; `grad_norm`: 0-d."""
        device = losses[0].loss.device
        stacked = torch.stack([*(part.loss.detach() for part in losses), grad_norm.detach().to(device).float()])
        event = None
        if stacked.is_cuda:
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, keys, stacked, event))

    def failed(self) -> bool:
        """Return whether any step whose values are known by now had a non-finite value or a loss spike."""
        self._look(wait=False)
        return bool(self._bad)

    def first_bad(self) -> str:
        """Return a description of the first non-finite value or loss spike; "" if there is none. Waits for the GPU."""
        self._look(wait=True)
        return self._bad

    def losses(self) -> list[float]:
        """Return this rank's finite losses that have not been compared yet, in the order of the steps. Waits for the
        GPU."""
        self._look(wait=True)
        return [loss for *_, loss in self._finite]

    def loss(self, step: int) -> float:
        """Return this rank's loss of a step; 0 if the step is not to be compared. `failed` must have been called, and
        `step` must be at least LAG steps old."""
        return next((loss for at, _, loss in self._finite if at == step), 0.0)

    def compare(self, step: int, loss: float) -> bool:
        """Compare the loss of `step`, a mean over ranks, with the losses of earlier steps, unless they have already
        been compared. Return whether it is a spike. Every rank must call this method with the same values, so that all
        ranks find the same spike."""
        if not self._finite or self._finite[0][0] != step:
            return False
        _, keys, _ = self._finite.popleft()
        spike = self.spikes.add(loss) if self.spikes else ""
        if spike:
            self._set_bad(step, f"the loss of step {step} is a spike: {spike}", keys)
        return bool(spike)

    def compare_all(self, losses: Sequence[float]) -> None:
        """Compare the losses of the next steps with earlier losses. `losses`: the means over ranks."""
        for loss in losses:
            self.compare(self._finite[0][0], loss)

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
                if self.spikes:
                    self._finite.append((step, keys, float(values[:-1].sum())))
            else:
                what = "gradient norm" if values[:-1].isfinite().all() else "loss"
                self._set_bad(step, f"the {what} of step {step} is not finite", keys)

    def _set_bad(self, step: int, what: str, keys: list[str]) -> None:
        if self.bad_step is not None and self.bad_step < step:
            return
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        self.bad_step, self._bad = step, f"{what}; samples: {shown}"
