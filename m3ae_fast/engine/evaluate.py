"""Losses on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.engine.interface import Engine
from m3ae_fast.process.ranks import Ranks


def evaluate(
    engine: Engine,
    loader: Iterable[PackedBatch],
    ranks: Ranks,
    with_targets: Callable[[PackedBatch], PackedBatch],
    look: Callable[[PackedBatch], None] = lambda batch: None,
) -> dict[str, float]:
    """Return metrics to log: means over the whole of `loader`, whose ranks' batches are parts of one set.

    `with_targets` makes on the device the targets that a batch still lacks, and `look` is shown the result. Every rank
    must call it, with equally many batches.
    """
    sums = [0.0] * 6
    for batch in loader:
        image, text = batch.counts
        batch = with_targets(batch.to(ranks.device))
        losses = engine.evaluate(batch)
        look(batch)
        part = (
            image,
            float(losses.image_loss) * image,
            text,
            float(losses.text_loss) * text,
            float(losses.text_accuracy) * text,
            len(batch.skipped),
        )
        sums = [a + b for a, b in zip(sums, part)]
    image, image_loss, text, text_loss, text_accuracy, skipped = ranks.sum(sums)
    values: dict[str, float] = {"val_skipped": int(skipped)} if skipped else {}
    if image:
        values["val_image_loss"] = image_loss / image
    if text:
        values["val_text_loss"] = text_loss / text
        values["val_text_accuracy"] = text_accuracy / text
    return values
