"""Default training length and learning rate of a classifier, by number of training samples, for settings that are left
at null.

At ImageNet's size it is the official recipe. On fewer samples

- the batch shrinks with them, so that an epoch keeps about as many steps, down to a smallest batch;
- the epochs stay, and are more where they would be too few steps: fine-tuning sees 256,000 samples at least, as
  BiT-HyperRule has it (arXiv 1912.11370). Warm-up is the same fraction of them;
- the learning rate of the linear probe is multiplied by the batch (arXiv 1706.02677) and grows for fewer steps: a step
  of LARS moves a weight by a fraction of its norm, so that the sum of all rates says how often weights are renewed.
  That sum grows a little, and is at most 5 for each sample: the fewer samples there are, the sooner a probe overfits.
  Both numbers are those of lab/results/recipe.md. The rate of fine-tuning stays, as in the official code: Adam's for
  fewer steps would be higher, and for a smaller batch lower (arXiv 2205.10287).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from m3ae_fast.config.evaluation import FineTuneConfig, LinearProbeConfig
from m3ae_fast.engine.schedule import Schedule

IMAGENET = 1_281_167  # training samples
_MORE = 0.2  # power of how many times fewer samples there are, by which the sum of a probe's rates is higher
C = TypeVar("C", LinearProbeConfig, FineTuneConfig)


@dataclass(frozen=True)
class Recipe:
    """For a number of samples; the fields are named as the settings."""

    global_batch: int
    epochs: int
    warmup_epochs: float
    peak_lr: float


@dataclass(frozen=True)
class Official:
    """The published recipe for ImageNet, and what smaller sets get at least."""

    recipe: Recipe
    smallest_batch: int
    fewest_steps: int
    rate_per_sample: float | None  # sum over all steps, at most; None: the rate is the published one

    def scaled(self, samples: int) -> Recipe:
        """Return the recipe for so many training samples."""
        whole = self.recipe
        batch = _power_of_two(samples / (IMAGENET // whole.global_batch))
        batch = min(max(batch, min(self.smallest_batch, _power_of_two(samples))), whole.global_batch)
        steps_per_epoch = max(samples // batch, 1)
        epochs = max(whole.epochs, math.ceil(self.fewest_steps / steps_per_epoch))
        warmup = round(whole.warmup_epochs * epochs / whole.epochs, 1)
        return Recipe(batch, epochs, warmup, self._rate(samples, batch, epochs * steps_per_epoch))

    def _rate(self, samples: int, batch: int, steps: int) -> float:
        """Return the rate of a run of so many steps with that batch."""
        whole = self.recipe
        if self.rate_per_sample is None:
            return whole.peak_lr
        of_step = whole.peak_lr * whole.global_batch
        total = of_step * whole.epochs * (IMAGENET // whole.global_batch) * (IMAGENET / samples) ** _MORE
        total = min(total, 256 * self.rate_per_sample * samples)
        return float(f"{max(total / steps, of_step) / batch:.3g}")


OFFICIAL = {
    "linear": Official(Recipe(2048, 90, 10, 0.1), smallest_batch=256, fewest_steps=1000, rate_per_sample=5.0),
    "finetune": Official(Recipe(1024, 100, 5, 1e-3), smallest_batch=64, fewest_steps=4000, rate_per_sample=None),
}


def _power_of_two(value: float) -> int:
    """Return the nearest power of two, at least 2."""
    return max(2, 2 ** round(math.log2(value)))


def settled(config: C, samples: int, saved: Mapping[str, Any]) -> C:
    """Return the config with a value for each setting that it leaves open.

    Args:
        config: null where a setting is open.
        samples: of an epoch.
        saved: the section of the checkpoint that the run continues from, whose values an open setting takes; may be
            empty.
    """
    recipe = OFFICIAL[config.SECTION].scaled(samples)
    values: dict[str, Any] = {"global_batch": recipe.global_batch, "peak_lr": recipe.peak_lr, **saved}
    known = {key: values[key] for key in ("global_batch", "peak_lr") if getattr(config, key) is None}
    if config.epochs is None and config.steps is None:
        length = saved or {"epochs": float(recipe.epochs), "steps": None}
        known |= {key: length[key] for key in ("epochs", "steps")}
    config = config.model_copy(update=known)
    if config.warmup_epochs is not None:
        return config
    fraction = recipe.warmup_epochs / recipe.epochs
    warmup = round(epochs_of(Schedule(config, config.model_copy(update={"warmup_epochs": 0.0}), samples)) * fraction, 1)
    return config.model_copy(update={"warmup_epochs": saved.get("warmup_epochs", warmup)})


def epochs_of(schedule: Schedule) -> float:
    """Return the length of a run in epochs."""
    return schedule.total_steps / schedule.steps_per_epoch


def chosen(config: LinearProbeConfig | FineTuneConfig) -> dict[str, Any]:
    """Return the settings of a settled config that a recipe has."""
    return config.model_dump(include={"global_batch", "epochs", "steps", "warmup_epochs", "peak_lr"})


def sentence(config: LinearProbeConfig | FineTuneConfig, schedule: Schedule, start: int) -> str:
    """Return a sentence that describes the run from step `start` on."""
    return (
        f"{schedule.samples:,} samples, batch {config.global_batch}, steps {start:,} to {schedule.total_steps:,} "
        f"({epochs_of(schedule):.4g} epochs, of which {config.warmup_epochs:g} warm up), {schedule.describe_rate()}"
    )
