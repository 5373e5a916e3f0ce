"""The options of the commands of `m3ae-fast shards`, which are also the arguments of the Python functions of the same
names. This module does not import torch, so that `--help` is fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import MAX_CHANNELS
from m3ae_fast.config.arguments import SHARDS, Arguments, Labels, Name, Option, ValueRange, names, output
from m3ae_fast.shards.sources import SOURCE_KINDS, SourceKind


class AppliesTo(Option):
    """Annotation of an option that applies only to some kinds of sources."""

    def __init__(self, *kinds: SourceKind, **how: Any) -> None:
        super().__init__(group=f"options for {' or '.join(SOURCE_KINDS[kind] for kind in kinds)}", **how)
        self.kinds = kinds


def kinds_with(option: str) -> tuple[SourceKind, ...]:
    """Return the kinds of sources to which an option of SourceOptions applies."""
    return next(each.kinds for each in SourceOptions.model_fields[option].metadata if isinstance(each, AppliesTo))


class ColumnOptions(Arguments):
    """The columns of a table or of a dataset."""

    image_column: Annotated[str | None, AppliesTo("folder", "huggingface", metavar="NAME")] = None
    """column of paths or images in a table or a dataset (default: detected)"""
    caption_column: Annotated[str | None, AppliesTo("folder", "huggingface", metavar="NAME")] = None
    """column of captions (default: detected); '' reads no captions, and stores the other columns in KEY.json"""


class SourceOptions(ColumnOptions):
    """Options for what is read from a source."""

    captions: Annotated[Path | None, AppliesTo("folder", metavar="TABLE")] = None
    """table of captions: .csv, .tsv, .jsonl or .parquet (default: NAME.txt next to NAME.jpg)"""
    classes: Annotated[Path | Sequence[str] | None, AppliesTo("folder", metavar="FILE")] = None
    """classes.json of other shards, to assign the same label ids; in Python, also the names in the order of their
    ids"""
    flat: Annotated[bool, AppliesTo("folder")] = False
    """do not use sub-folders as splits or classes"""
    masks: Annotated[Path | None, AppliesTo("folder", metavar="FOLDER")] = None
    """folder of label masks: a single-channel NAME.png for NAME.jpg, in the same sub-folders (for evaluate segment)"""
    subset: Annotated[str | None, AppliesTo("huggingface", metavar="NAME")] = None
    """configuration of the dataset, if it has several"""
    split: Annotated[str | None, AppliesTo("huggingface", metavar="NAME")] = None
    """split to convert (default: all)"""
    label_column: Annotated[str | None, AppliesTo("huggingface", metavar="NAME")] = None
    """column of labels in a dataset (default: detected)"""


class GroupOption(Arguments):
    """The option that keeps samples together if some samples are held out."""

    group: Annotated[str | None, Option(metavar="FIELD", group="held-out samples")] = None
    """keep samples with equal values of FIELD in the same split; FIELD is a column of the table, json.NAME (a
    field of KEY.json), or folder (the folder of the image)"""


class ShardOptions(GroupOption):
    """Options for how shards are written."""

    short_side: Annotated[int, Field(ge=1, le=1 << 16), Option(metavar="N", group="shards")] = 320
    """scale the short side of images down to N pixels; smaller JPEGs are copied unchanged"""
    samples_per_shard: Annotated[int, Field(ge=1, le=1 << 32), Option(metavar="N", group="shards")] = 2000
    """maximum number of samples per shard"""
    value_range: Annotated[ValueRange, Option(metavar="LOW,HIGH|dtype", group="shards")] = None
    """pixel values that map to black and white in images with more than 8 bits per channel"""
    held_out: Annotated[float, Field(ge=0, lt=1), Option(metavar="FRACTION", group="held-out samples")] = 0.0
    """fraction of the samples that are written to val-*.tar (default: 0)"""
    keep_order: Annotated[bool, Option(group="shards")] = False
    """keep the order of SOURCE (default: shuffle the samples, always in the same way)"""

    @model_validator(mode="after")
    def _groups_are_held_out(self) -> ShardOptions:
        if self.group is not None and not self.held_out:
            raise UserError(f"group {self.group}: has an effect only if samples are held out; add --held-out")
        return self


class MakeOptions(ShardOptions, SourceOptions):
    """The options of `m3ae-fast shards make`."""

    source: Annotated[Name, Option("source", metavar="SOURCE")]
    """a folder, an HDF5 file, or the name of a dataset on the Hub"""
    out: Annotated[Path, BeforeValidator(output()), Option(metavar="DIR")]
    """output folder: a new folder, or the folder of an interrupted command, which is then continued"""
    workers: Annotated[Annotated[int, Field(ge=1, le=1024)] | None, Option(metavar="N", group="shards")] = None
    """number of worker processes (default: one per core)"""


class OfShards(Arguments):
    """The options of a command that reads shards."""

    shards: Annotated[
        Sequence[str], BeforeValidator(names), Field(min_length=1), Option("shards", nargs="+", metavar="SHARDS")
    ] = Field(description=SHARDS)
    cache_dir: Annotated[Path | None, Option(metavar="DIR")] = None
    """folder for copies of remote shards (default: ~/.cache/m3ae_fast)"""


class TableOptions(OfShards):
    """The options of `m3ae-fast shards table`."""

    out: Annotated[Annotated[Path, BeforeValidator(output(".npy"))] | None, Option(metavar="FILE.npy")] = None
    """write a manifest to this file"""
    stats: bool = False
    """with --out: read the numbers of samples from the NAME_stats.json files that img2dataset wrote"""


class StatsOptions(OfShards):
    """The options of `m3ae-fast shards stats`."""

    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS), Option(metavar="C")] = 3
    """number of image channels of the model"""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """model.image_dtype of the model"""
    value_range: ValueRange = None
    """pixel values that map to black and white in images with more than 8 bits per channel"""
    tokenizer: Annotated[Name | None, Option(metavar="FILE")] = None
    """tokenizer used to measure caption lengths in tokens (default: in words)"""
    labels: Labels = "cls"
    """source of the labels: cls (integers in KEY.cls; default) or json.FIELD (a field of KEY.json)"""
    out: Annotated[Annotated[Path, BeforeValidator(output(".png"))] | None, Option(metavar="FILE.png")] = None
    """write a figure with histograms"""
    write: Annotated[Path | None, Option(metavar="CONFIG")] = None
    """config into which the settings derived from the statistics are written"""


class TokenizerOptions(OfShards):
    """The options of `m3ae-fast shards tokenizer`."""

    vocab_size: int
    """maximum number of tokens, including special tokens"""
    out: Annotated[Path, BeforeValidator(output(".json")), Option(metavar="FILE.json")]
    """output file"""
