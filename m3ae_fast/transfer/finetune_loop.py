"""What fine-tuning trains, and what its loop counts and evaluates.

Shapes: S samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.data import Corpus
from m3ae_fast.encoding import check_skipped
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.interface import State
from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.transfer.augment import Mixing
from m3ae_fast.transfer.classifier import Classifier, ClassifierConfig
from m3ae_fast.transfer.labelled_loop import ClassLosses, LabelledLoop
from m3ae_fast.transfer.metrics import accuracies


class TrainableClassifier(Classifier):
    """In training, `forward(batch, samples)` gives ClassLosses: sums over the batch, divided by `samples`."""

    def __init__(self, config: ClassifierConfig, mixing: Mixing) -> None:
        super().__init__(config)
        self.mixing = mixing

    def forward(self, batch: PackedBatch, samples: float = 1.0) -> Any:
        if not self.training:
            return super().forward(batch)
        batch, labels_SK = self.mixing(batch, self.backbone.patch_embed.weight.dtype)
        logits_SK = super().forward(batch).float()
        loss = F.cross_entropy(logits_SK, labels_SK, reduction="sum") / samples
        correct = (logits_SK.argmax(1) == labels_SK.argmax(1)).sum()
        return ClassLosses(loss, correct.float() / samples)


@dataclass(kw_only=True)
class FineTuning(LabelledLoop):
    """A fine-tuning run."""

    config: FineTuneConfig
    model: TrainableClassifier
    val: Corpus
    val_loader: DataLoader[PackedBatch]
    max_bad_fraction: float
    average: Any  # None, or timm's ModelEmaV3

    def seed_step(self) -> None:
        super().seed_step()
        np.random.seed(torch.initial_seed() & 0xFFFFFFFF)  # mixup's and cutmix's

    def take_step(self, fed: Fed, counts: float) -> tuple[list[ClassLosses], Tensor]:
        taken = super().take_step(fed, counts)
        if self.average is not None:
            self.average.update(self.model)
        return taken

    def complete(self, state: State) -> State:
        if self.average is None:
            return state
        named = self.average.module.named_parameters()
        return state | {f"ema/{name}": p.detach().to("cpu", torch.float32, copy=True) for name, p in named}

    def evaluate(self) -> dict[str, float]:
        """Accuracies on all held-out samples, which are logged too.

        Raises:
            UserError: too many of them cannot be used.
        """
        self.stop_if_not_finite()
        sums: dict[str, float] = {}
        samples, skipped = 0, []
        with self._inference() as infer:
            for batch in self.pulse.watch(self.val_loader, f"evaluating after step {self.step}"):
                skipped += batch.skipped
                samples += len(batch.keys)
                logits_SK = infer(batch.to(self.ranks.device)).float()
                assert batch.labels is not None
                shares = accuracies(logits_SK.cpu(), batch.labels) if len(batch.keys) else {}
                for name, share in shares.items():
                    sums[name] = sums.get(name, 0.0) + share * len(batch.keys)
        skipped = [each for part in self.ranks.gather(skipped) for each in part]
        check_skipped(skipped, self.val.samples, self.max_bad_fraction)
        names = ("top1", "top5") if len(self.model.config.classes) > 5 else ("top1",)
        total, *correct = self.ranks.sum([samples, *(sums.get(name, 0.0) for name in names)])
        values = {name: value / total for name, value in zip(names, correct)}
        if self.log:
            self.log.log(self.step, {f"val_{name}": value for name, value in values.items()})
        return values

    @contextmanager
    def _inference(self) -> Iterator[Callable[[PackedBatch], Tensor]]:
        """Logits of a batch, by the average of the weights where there is one."""
        if self.average is None:
            yield self.engine.evaluate
            return
        bf16 = self.config.precision == "bf16"
        with torch.no_grad(), torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=bf16):
            yield self.average.module
