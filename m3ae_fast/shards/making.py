"""Creation of shards from a folder of images, an HDF5 file or a Hugging Face dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from m3ae_fast.config import Range
from m3ae_fast.shards.settings import Settings
from m3ae_fast.shards.sources.registry import open_source
from m3ae_fast.shards.writer import Converted, convert


def make(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    captions: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    flat: bool = False,
    masks: str | os.PathLike[str] | None = None,
    subset: str | None = None,
    split: str | None = None,
    held_out: float = 0.0,
    group: str | None = None,
    keep_order: bool = False,
    short_side: int = Settings.short_side,
    value_range: Range | None = None,
    samples_per_shard: int = Settings.samples_per_shard,
    workers: int | None = None,
) -> Converted:
    """Create shards from a source, and return counts of the result. The same source and arguments produce
    byte-identical shards. To resume an interrupted call, repeat it.

    Args:
        source, captions, image_column, caption_column, label_column, classes, flat, masks, subset, split: as in
            `open_source`.
        out: output folder: a new folder, or the folder of a call with the same arguments.
        held_out: fraction of the samples that are held out in val-*.tar. Identical images are held out together.
        group: field whose equal values keep samples in the same split: a column of the table or the dataset, "json."
            and the name of a field, or "folder" for the folder of an image; None: only identical images are kept
            together.
        keep_order: whether to keep the order of the samples instead of shuffling them.
        short_side: number of pixels to which the shorter side of larger images is reduced.
        value_range: values of black and white in images with more than 8 bits per channel; "dtype": the limits of the
            data type.
        samples_per_shard: maximum number of samples in a shard.
        workers: number of worker processes; None: one per core.

    Raises:
        UserError: the source or an argument is invalid, or `out` contains other files or cannot be written.
    """
    settings = Settings(
        samples_per_shard, short_side, held_out=held_out, group=group, value_range=value_range, keep_order=keep_order
    )
    records = open_source(
        source,
        captions=captions,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        classes=classes,
        flat=flat,
        masks=masks,
        subset=subset,
        split=split,
    )
    return convert(records, Path(out), settings, len(os.sched_getaffinity(0)) if workers is None else workers)
