"""Losses on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.model.batch import PackedBatch


def evaluate(
    engine: Engine, loader: Iterable[PackedBatch], ranks: Ranks, complete: Callable[[PackedBatch], PackedBatch]
) -> dict[str, float]:
    """Means over all pictures and captions of `loader`, whose ranks' batches are parts of one set: what to log.

    `complete` makes on the device what a batch still lacks. Every rank must call it, with equally many batches.
    """
    sums = [0.0] * 6
    for batch in loader:
        images, captions = batch.counts
        losses = engine.evaluate(complete(batch.to(ranks.device)))
        part = (
            images,
            float(losses.image_loss) * images,
            captions,
            float(losses.text_loss) * captions,
            float(losses.text_accuracy) * captions,
            len(batch.skipped),
        )
        sums = [a + b for a, b in zip(sums, part)]
    images, image_loss, captions, text_loss, text_accuracy, skipped = ranks.sum(sums)
    values: dict[str, float] = {"val_skipped": int(skipped)} if skipped else {}
    if images:
        values["val_image_loss"] = image_loss / images
    if captions:
        values["val_text_loss"] = text_loss / captions
        values["val_text_accuracy"] = text_accuracy / captions
    return values
