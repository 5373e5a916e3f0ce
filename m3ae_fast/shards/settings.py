"""Settings for the creation of shards."""

from __future__ import annotations

from dataclasses import dataclass

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Range, check_range_argument

_LIMITS = {"short_side": (1, 1 << 16), "quality": (1, 100), "samples_per_shard": (1, 1 << 32)}


@dataclass(frozen=True)
class Settings:
    """Settings for the creation of shards."""

    samples_per_shard: int = 2000
    short_side: int = 320  # maximum number of pixels of the shorter side; larger images are scaled down
    quality: int = 95  # JPEG quality
    # fraction of the samples that are held out as a separate split; all samples of an image are in the same split
    held_out: float = 0.0
    group: str | None = None  # field whose equal values keep samples in the same split; see `Records.values`
    value_range: Range | None = None  # values of black and white in images with more than 8 bits per channel
    keep_order: bool = False  # whether to keep the order; otherwise samples are shuffled deterministically
    of_run: bool = False  # whether the shards are made by a run of `pretrain`, which may replace them

    def __post_init__(self) -> None:
        """Raise UserError if a value is invalid."""
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from {low} to {high}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out:g}: must be a fraction, 0 or more and below 1")
        if self.group is not None and not self.held_out:
            raise UserError(f"--group {self.group}: has an effect only if samples are held out (--held-out)")
        check_range_argument(self.value_range)
