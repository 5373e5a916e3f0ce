"""Creation of shards from a folder of images, an HDF5 file or a Hugging Face dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.config import Range
from m3ae_fast.shards.settings import SOURCE_KINDS, Settings, SourceKind
from m3ae_fast.shards.sources.folder import Folder
from m3ae_fast.shards.sources.hdf5 import Hdf5
from m3ae_fast.shards.sources.huggingface import HuggingFace
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.sources.recognition import kind_of_source
from m3ae_fast.shards.writer import Converted, convert

_OPTIONS_OF: dict[str, tuple[SourceKind, ...]] = {
    **dict.fromkeys(("captions", "classes", "flat", "masks"), ("folder",)),
    **dict.fromkeys(("image_column", "caption_column"), ("folder", "huggingface")),
    **dict.fromkeys(("subset", "split", "label_column"), ("huggingface",)),
}  # for each option, the kinds of source that use it


def make(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: SourceKind | None = None,
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
    keep_order: bool = False,
    short_side: int = Settings.short_side,
    quality: int = Settings.quality,
    image_range: Range | None = None,
    samples_per_shard: int = Settings.samples_per_shard,
    workers: int | None = None,
) -> Converted:
    """Create shards from a source, and return counts of the result. Equal input gives equal bytes. A repeated call
    resumes an interrupted one.

    Args:
        source, kind, captions, image_column, caption_column, label_column, classes, flat, masks, subset, split: as in
            `open_source`.
        out: output folder: a new folder, or the folder of a call with the same arguments.
        held_out: fraction of the samples that are held out in val-*.tar.
        keep_order: whether to keep the order of the samples instead of shuffling them.
        short_side: number of pixels to which the shorter side of larger images is reduced.
        quality: JPEG quality, from 1 to 100.
        image_range: values of black and white in images of more than 8 bits; "dtype": the limits of their data type.
        samples_per_shard: maximum number of samples in a shard.
        workers: number of worker processes; None: one per core.

    Raises:
        UserError: the source or an argument is invalid, or `out` contains other files or cannot be written.
    """
    settings = Settings(samples_per_shard, short_side, quality, held_out, image_range, keep_order)
    records = open_source(
        source,
        kind=kind,
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
    return convert(records, Path(out), settings, workers or len(os.sched_getaffinity(0)))


def open_source(
    source: str | os.PathLike[str],
    *,
    kind: SourceKind | None = None,
    captions: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    flat: bool = False,
    masks: str | os.PathLike[str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Records:
    """Return the samples of a source.

    Args:
        source: a folder of images, an HDF5 file in the layout of the official code, or a Hugging Face dataset, which is
            a folder written by `save_to_disk`, a folder of data files, or a name on the hub.
        kind: kind of the source; None: detected.
        captions: for a folder of images, the file of a table with a row for each sample; None: .txt files next to the
            images.
        image_column, caption_column: column names of the table or the dataset; None: detected.
        label_column: column name of the dataset; None: detected.
        classes: for a folder of images, the classes in the order of their labels, or the classes.json of other shards.
        flat: for a folder of images, whether to ignore the meaning of sub-folders as splits and classes.
        masks: for a folder of images, a folder with the label masks in the same sub-folders: a single-channel NAME.png
            for each NAME.jpg. In the shards, a mask is stored as KEY.mask.png next to its image.
        subset: for a dataset, the name of the subset (configuration).
        split: for a dataset, the split to read; None: all splits.

    Raises:
        UserError: the source cannot be read, or an argument does not apply to sources of its kind.
    """
    name = os.fspath(source)
    kind = kind or kind_of_source(name)
    options: dict[str, object] = {"captions": captions, "classes": classes, "flat": flat, "masks": masks}
    options |= {
        "subset": subset,
        "split": split,
        "image_column": image_column,
        "caption_column": caption_column,
        "label_column": label_column,
    }
    for option, value in options.items():
        if value not in (None, False) and kind not in _OPTIONS_OF[option]:
            wanted = " or ".join(SOURCE_KINDS[each] for each in _OPTIONS_OF[option])
            option = option.replace("_", "-")
            raise UserError(f"--{option} is for {wanted}; {name} is {SOURCE_KINDS[kind]} (if it is not, give --kind)")
    if kind == "hdf5":
        return Hdf5(Path(name))
    if kind == "huggingface":
        return HuggingFace(name, subset, split, (image_column, caption_column, label_column))
    table = None if captions is None else Path(captions)
    names = _read_classes(classes) if isinstance(classes, str | os.PathLike) else classes
    columns = (image_column, caption_column)
    return Folder(Path(name), table, columns, names, flat, None if masks is None else Path(masks))


def _read_classes(path: str | os.PathLike[str]) -> list[str]:
    try:
        names = read_json(Path(path))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        return names
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from None
