"""Derives the hyper-parameters of a probe on features from the settings and the number of training samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m3ae_fast.config import KnnConfig
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.heads.training_defaults import OFFICIAL

ATTENTIVE = "attentive"  # the probe of patch tokens; the only one whose result depends on the seed
ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # peak learning rates to try with AdamW
_WARMUP = 1 / 9  # fraction of the steps that belong to the warm-up, as for the linear probe


@dataclass(frozen=True)
class Recipe:
    """A kind of probe and its hyper-parameters, for a number of training samples."""

    probe: str  # a key of `probes.PROBES`
    classes: int
    seed: int  # random seed of the initial weights and of the order of the samples
    knn: KnnConfig
    # the training of attentive probes, and of linear heads that are trained with them
    steps: int
    batch: int  # samples per step
    attention_heads: int
    weight_decay: float
    rates: Sequence[float]  # peak learning rates; if there are several, `try_rates` tries them

    @classmethod
    def of(
        cls,
        probe: str,
        config: EvaluationConfig,
        *,
        classes: int,
        samples: int,
        encoder_heads: int,
        seed: int | None = None,
    ) -> Recipe:
        """Return a recipe, with defaults in place of settings that are null.

        Args:
            probe: the kind of probe.
            config: the settings.
            classes: number of classes.
            samples: number of training samples.
            encoder_heads: number of attention heads of the encoder.
            seed: the random seed; None: `run.seed`.
        """
        given, usual = config.attentive, OFFICIAL["linear"].scaled(samples)
        batch = min(given.batch or usual.global_batch, samples)
        return cls(
            probe=probe,
            classes=classes,
            seed=config.run.seed if seed is None else seed,
            knn=config.knn,
            steps=given.steps or math.ceil(usual.epochs * samples / batch),
            batch=batch,
            attention_heads=given.heads or encoder_heads,
            weight_decay=given.weight_decay,
            rates=ATTENTIVE_RATES if given.peak_lr is None else (given.peak_lr,),
        )

    def lr(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of the peak learning rate."""
        return warmup_cosine(step, round(self.steps * _WARMUP), self.steps)
