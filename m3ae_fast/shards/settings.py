"""How shards are made."""

from __future__ import annotations

from dataclasses import dataclass

from m3ae_fast.config import Range


@dataclass(frozen=True)
class Settings:
    """How shards are made."""

    samples_per_shard: int = 2000
    short_side: int = 320  # pixels; larger images are scaled down
    quality: int = 95  # of JPEG
    held_out: float = 0.0  # fraction of the samples that go to a split of their own, with all samples of an image
    image_range: Range | None = None  # of images of more than 8 bits
    keep_order: bool = False  # else shuffled, always in the same way
