"""The content of a line of metrics.jsonl about training steps; docs/guide/metrics.md explains the keys.

The same file has lines about evaluations (from `engine/validation_metrics.py`, `evaluation/knn_during_training.py` and
`evaluation/labelled_task.py`) and about changes of the number of steps (from `trainer.py`). `metrics_log.py` writes all
of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from m3ae_fast.base.hardware import peak_memory
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.training.throughput import ForwardTime, Rates


@dataclass(kw_only=True)
class MetricsLine:
    """The values that are logged after a training step, over all ranks."""

    ranks: Ranks
    throughput: Rates
    forward: ForwardTime
    not_computed: tuple[str, ...]  # prefixes of the losses that the run does not compute
    logged: int  # step of the last line; before the first line, the step from which the run starts

    def after(
        self, step: int, losses: list[Any], grad_norm: Tensor, lr: float, epoch: float, skipped: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values by key and, if there are several nodes, the name of the node for each value that belongs to
        a single rank. Every rank must call this method.

        Args:
            step: number of steps taken.
            losses: the losses of this rank's micro-batches in the last step.
            grad_norm: global gradient norm of the last step, before clipping.
            lr: learning rate of the last step.
            epoch: number of epochs so far.
            skipped: number of samples so far that could not be used.
        """
        world, rates = self.ranks.world, self.throughput.rates()
        own = [sum(values).item() for values in zip(*losses)]  # waits for the GPU
        forward_s = self.forward.per_step(step - self.logged)
        self.logged = step
        by_rank = [0.0] * 2 * world
        by_rank[self.ranks.rank :: world] = rates["data_wait"], forward_s
        sums = self.ranks.sum([*own, *by_rank])
        means = zip(losses[0]._fields, sums)
        values = {name: value / world for name, value in means if not name.startswith(self.not_computed)}
        values |= {"lr": lr, "grad_norm": float(grad_norm), "epoch": epoch, **rates}
        where: dict[str, str] = {}
        for name, each in (("data_wait", sums[-2 * world : -world]), ("forward_s", sums[-world:])):
            values[name] = max(each)
            where |= {name: self.ranks.hosts[each.index(values[name])]} if len(set(self.ranks.hosts)) > 1 else {}
        return values | {"peak_memory_gb": peak_memory(self.ranks.device) / 1e9, "skipped": skipped}, where
