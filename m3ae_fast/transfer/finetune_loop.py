"""The classifier that fine-tuning trains, and its training loop.

Shapes: S samples of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.batch.bad_samples import Skipped
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.data import Corpus
from m3ae_fast.encoding import check_skipped
from m3ae_fast.engine.optimizer import EMA
from m3ae_fast.process.stopping import Stopped, until_stopped
from m3ae_fast.transfer.augment import Mixing
from m3ae_fast.transfer.classifier import Classifier, ClassifierConfig
from m3ae_fast.transfer.labelled_loop import ClassLosses, LabelledLoop
from m3ae_fast.transfer.predictions import Predictions
from m3ae_fast.transfer.recipe import sentence


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

    settings: FineTuneConfig
    model: TrainableClassifier
    val: Corpus
    val_loader: DataLoader[PackedBatch]
    max_bad_fraction: float
    fixed: dict[str, Tensor]  # weights that training does not change
    averaged: Classifier | None  # with finetune.ema: takes the average of the weights when it is evaluated

    def announce(self) -> None:
        config, ranks, deepspeed = self.settings, self.ranks, self.settings.deepspeed
        kind = f"DeepSpeed ZeRO stage {deepspeed.zero_optimization.stage}" if deepspeed else "plain torch"
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        self.say_first(
            f"classifier, {parameters:,} parameters, on {ranks.world} x {ranks.device.type}, {config.precision}, "
            f"{kind}, optimiser: {self.engine.optimizer_name}, {sentence(config, self.schedule, self.step)}"
        )

    def evaluate_if_due(self) -> None:
        """Evaluate if due, between the first step and the last."""
        if 0 < self.step < self.schedule.total_steps and self.to_evaluate(self.settings.eval_every, "val_top1"):
            self.conclude()

    def conclude(self) -> dict[str, float] | None:
        """Return accuracies on all held-out samples, which are logged too; None where a rank is asked to stop.

        Raises:
            UserError: too many of them cannot be used.
        """
        self.stop_if_not_finite()
        own: list[tuple[Predictions, tuple[Skipped, ...]]] = []
        batches = self.pulse.watch(self.val_loader, f"evaluating after step {self.step}")
        try:
            with self._inference() as infer:
                for batch in until_stopped(batches, self.ranks, self.stop):
                    assert batch.labels is not None
                    scores_SK = infer(batch.to(self.ranks.device)).float()
                    own.append((Predictions.of(batch.keys, batch.labels, scores_SK), batch.skipped))
        except Stopped:
            self.cut_short()
            return None
        predictions, skipped = zip(*(part for parts in self.ranks.gather(own) for part in parts))
        check_skipped([each for part in skipped for each in part], self.val.samples, self.max_bad_fraction)
        return self.evaluated(Predictions.joined(predictions))

    @contextmanager
    def _inference(self) -> Iterator[Callable[[PackedBatch], Tensor]]:
        """Return logits of a batch, by the average of the weights if there is one."""
        if self.averaged is None:
            yield self.engine.evaluate
            return
        average = self.engine.whole(EMA)
        for name, p in self.averaged.named_parameters():
            p.data.copy_(average[name])
        bf16 = self.settings.precision == "bf16"
        with torch.no_grad(), torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=bf16):
            yield self.averaged
