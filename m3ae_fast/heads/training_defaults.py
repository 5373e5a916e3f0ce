"""Default training length and learning rate of a classifier, which replace settings that are not given. They depend on
the number of training samples.

For a dataset of ImageNet's size, the defaults are the official recipe. For fewer samples, they are changed as follows:

- Batch size: it is reduced in proportion to the number of samples, down to a minimum, so that an epoch has about as
  many steps as an epoch of ImageNet.
- Epochs: their number is increased if there would otherwise be too few steps. Fine-tuning processes at least 256,000
  samples, as in BiT-HyperRule (arXiv 1912.11370). The warm-up is always the same fraction of the run.
- Learning rate of the linear probe: it is proportional to the batch size (arXiv 1706.02677), and higher for fewer
  steps. A step of LARS changes a weight by a fraction of its norm, so the learning rate summed over all steps
  determines how far the weights can move. This sum is larger for fewer samples, but at most 5 per sample, because a
  probe overfits sooner on few samples. The increase (_MORE) and this maximum were determined in lab/results/recipe.md.
  The learning rate of a step is never lowered below the official one, even if the sum then exceeds the maximum.
- Learning rate of fine-tuning: it is unchanged, as in the official code. For Adam, it should be higher for fewer steps,
  but lower for a smaller batch (arXiv 2205.10287).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from m3ae_fast.config import OptimConfig, TrainConfig
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.schedule import Schedule

IMAGENET = 1_281_167  # number of training samples of ImageNet
_MORE = 0.2  # for 1 / r of ImageNet's samples, the summed learning rate of a linear probe is multiplied by r ** _MORE

S = TypeVar("S", OptimConfig, TrainConfig)


@dataclass(frozen=True)
class LengthAndRate:
    """Training length and learning rate for a number of training samples; the fields have the names of the
    settings."""

    global_batch: int
    epochs: int
    warmup_epochs: float
    peak_lr: float


@dataclass(frozen=True)
class Official:
    """The published recipe for ImageNet, and limits on its changes for smaller datasets."""

    recipe: LengthAndRate
    smallest_batch: int
    fewest_steps: int
    # maximum of the learning rate summed over all steps, per training sample, unless the learning rate of a step would
    # then be below the published one; None: the published learning rate is used
    rate_per_sample: float | None
    rate_is_scaled: bool  # whether `peak_lr` is for a batch of 256, and multiplied by the batch size / 256

    def scaled(self, samples: int) -> LengthAndRate:
        """Return the recipe for this number of training samples."""
        whole = self.recipe
        batch = _power_of_two(samples / (IMAGENET // whole.global_batch))
        batch = min(max(batch, min(self.smallest_batch, _power_of_two(samples))), whole.global_batch)
        steps_per_epoch = max(samples // batch, 1)
        epochs = max(whole.epochs, math.ceil(self.fewest_steps / steps_per_epoch))
        warmup = round(whole.warmup_epochs * epochs / whole.epochs, 1)
        return LengthAndRate(batch, epochs, warmup, self._rate(samples, batch, epochs * steps_per_epoch))

    def _rate(self, samples: int, batch: int, steps: int) -> float:
        """Return the peak learning rate for these numbers of training samples, samples per batch, and steps."""
        whole = self.recipe
        if self.rate_per_sample is None:
            return whole.peak_lr
        of_step = whole.peak_lr * whole.global_batch
        total = of_step * whole.epochs * (IMAGENET // whole.global_batch) * (IMAGENET / samples) ** _MORE
        total = min(total, 256 * self.rate_per_sample * samples)
        return float(f"{max(total / steps, of_step) / batch:.3g}")


OFFICIAL = {
    "linear": Official(
        LengthAndRate(2048, 90, 10, 0.1),
        smallest_batch=256,
        fewest_steps=1000,
        rate_per_sample=5.0,
        rate_is_scaled=True,
    ),
    "finetune": Official(
        LengthAndRate(1024, 100, 5, 1e-3),
        smallest_batch=64,
        fewest_steps=4000,
        rate_per_sample=None,
        rate_is_scaled=False,
    ),
}


def _power_of_two(value: float) -> int:
    """Return the nearest power of two, at least 2."""
    return max(2, 2 ** round(math.log2(value)))


def with_defaults(
    config: EvaluationConfig, official: Official, samples: int, saved: Mapping[str, Any]
) -> EvaluationConfig:
    """Return the config with defaults in place of the hyper-parameters that are not given.

    Args:
        config: the config of the task.
        official: the published recipe of the task.
        samples: number of samples per epoch.
        saved: the values in the checkpoint from which the run resumes; they are used as defaults. Empty for a new run.
    """
    recipe = official.scaled(samples)
    train = _filled(config.train, {"global_batch": recipe.global_batch, **saved}, "global_batch")
    if train.epochs is None and train.steps is None:
        length = saved or {"epochs": float(recipe.epochs), "steps": None}
        train = train.model_copy(update={key: length[key] for key in ("epochs", "steps")})
    fraction = recipe.warmup_epochs / recipe.epochs
    warmup = round(epochs_of(Schedule(train, config.optim, samples)) * fraction, 1)
    values = {"peak_lr": recipe.peak_lr, "warmup_epochs": warmup, **saved}
    optim = _filled(config.optim, values, "peak_lr", "warmup_epochs")
    return config.model_copy(update={"train": train, "optim": optim})


def _filled(section: S, values: Mapping[str, Any], *keys: str) -> S:
    """Return the section with values for those settings in `keys` that are not given."""
    return section.model_copy(update={key: values[key] for key in keys if key not in section.model_fields_set})


def epochs_of(schedule: Schedule) -> float:
    """Return the length of a run in epochs."""
    return schedule.total_steps / schedule.steps_per_epoch


def chosen(config: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that belong to a recipe, from a config that `with_defaults` has completed."""
    optim = config.optim.model_dump(include={"peak_lr", "warmup_epochs"})
    return optim | config.train.model_dump(include={"global_batch", "epochs", "steps"})


def sentence(schedule: Schedule, start: int) -> str:
    """Return a sentence that describes the run from step `start` on."""
    return (
        f"{schedule.samples:,} samples, batch {schedule.train.global_batch}, steps {start:,} to "
        f"{schedule.total_steps:,} ({epochs_of(schedule):.4g} epochs, including {schedule.optim.warmup_epochs:g} of "
        f"warm-up), {schedule.describe_rate()}"
    )
