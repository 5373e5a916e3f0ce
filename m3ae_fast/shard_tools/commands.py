"""The commands that make shards: from-folder, from-hdf5, from-hf."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from m3ae_fast.command_line import command
from m3ae_fast.config import add_range_option
from m3ae_fast.errors import UserError
from m3ae_fast.regular_file import read_json
from m3ae_fast.shard_tools.folder import Folder
from m3ae_fast.shard_tools.hdf5 import Hdf5
from m3ae_fast.shard_tools.huggingface import HuggingFace
from m3ae_fast.shard_tools.records import Records
from m3ae_fast.shard_tools.writer import Settings, convert, describe_conversion

FOLDER = """Make shards of a folder of images.

Sub-folders are classes if there are at least two and every image is in one. Captions come from a table with one
row per sample, or from NAME.txt beside NAME.jpg. An image in several rows gives several samples, also where rows are
equal, and so does a list of captions in a row. Tables are read strictly: a row with a field too many or too few is an
error. A .tsv has a row on each line and no quotes, unless a program that quotes its fields wrote it. Images without a
caption train only the image side. Run an interrupted command again to continue; equal input gives equal bytes.

  python -m m3ae_fast.data from-folder images/ shards/ --held-out 0.05
  python -m m3ae_fast.data from-folder images/ shards/ --captions captions.csv --caption-column title
  python -m m3ae_fast.data from-folder imagenet/val shards-val/ --classes shards/classes.json
"""
HDF5 = """Make shards of an HDF5 file in the layout of the official M3AE code: jpg (variable-length uint8) with caption,
or ImageNet's train_jpg, train_labels, val_jpg, val_labels, or text alone. A row with several captions gives several
samples.

  python -m m3ae_fast.data from-hdf5 cc12m.hdf5 shards/ --held-out 0.01
  python -m m3ae_fast.data from-hdf5 imagenet.hdf5 shards/ --samples-per-shard 5000
"""
HF = """Make shards of a Hugging Face dataset: a folder that save_to_disk wrote, a folder of data files, or a name on
the hub. All splits are taken unless one is named. A row with a list of captions gives several samples.

  python -m m3ae_fast.data from-hf uoft-cs/cifar10 shards/
  python -m m3ae_fast.data from-hf saved/flickr30k shards/ --split train --caption-column caption
"""


def add_commands(commands: Any) -> None:
    folder = command(commands, "from-folder", "make shards of a folder of images", FOLDER, _from_folder)
    folder.add_argument("input", type=Path, metavar="DIR", help="folder of images, in sub-folders too")
    _add_out(folder)
    folder.add_argument("--captions", type=Path, metavar="TABLE", help=".csv, .tsv, .jsonl or .parquet")
    folder.add_argument("--image-column", metavar="NAME", help="its column of paths below DIR (default: detected)")
    folder.add_argument("--caption-column", metavar="NAME", help="its column of captions (default: detected)")
    folder.add_argument("--classes", type=Path, metavar="FILE", help="classes.json of other shards: same labels")
    folder.add_argument("--flat", action="store_true", help="sub-folders are not classes")

    hdf5 = command(commands, "from-hdf5", "make shards of an HDF5 file in the official layout", HDF5, _from_hdf5)
    hdf5.add_argument("input", type=Path, metavar="FILE")
    _add_out(hdf5)

    hf = command(commands, "from-hf", "make shards of a Hugging Face dataset", HF, _from_hf)
    hf.add_argument("input", metavar="DATASET", help="a folder, or a name on the hub")
    _add_out(hf)
    hf.add_argument("--subset", metavar="NAME", help="the configuration of a dataset that has several")
    hf.add_argument("--split", metavar="NAME", help="the split to take (default: all)")
    for what in ("image", "caption", "label"):
        hf.add_argument(f"--{what}-column", metavar="NAME", help=f"the column of {what}s (default: detected)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards: new, or to be continued")
    shards, usual = parser.add_argument_group("shards"), Settings()
    numbers = {
        "--short-side": (usual.short_side, "scale images down to this many pixels; smaller JPEGs stay as they are"),
        "--quality": (usual.quality, "of JPEGs, 1 to 100"),
        "--samples-per-shard": (usual.samples_per_shard, "at most"),
        "--workers": (len(os.sched_getaffinity(0)), "processes"),
    }
    for option, (default, text) in numbers.items():
        shards.add_argument(option, type=int, metavar="N", default=default, help=f"{text} (default: {default})")
    add_range_option(shards)
    shards.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="write this fraction of the samples to val-*.tar",
    )
    shards.add_argument(
        "--keep-order", action="store_true", help="do not shuffle (default: shuffle, deterministically)"
    )


def _settings(args: argparse.Namespace) -> Settings:
    limits = {"short_side": (1, 1 << 16), "quality": (1, 100), "samples_per_shard": (1, 1 << 32), "workers": (1, 1024)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: must be from {low} to {high}")
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: must be a fraction, 0 or more and below 1")
    return Settings(args.samples_per_shard, args.short_side, args.quality, args.held_out, args.range, args.keep_order)


def _convert(records: Records, settings: Settings, args: argparse.Namespace) -> None:
    print(describe_conversion(args.out, convert(records, args.out, settings, args.workers)))


def _from_folder(args: argparse.Namespace) -> None:
    settings = _settings(args)
    columns = (args.image_column, args.caption_column)
    folder = Folder(args.input, args.captions, columns, _read_classes(args.classes), args.flat)
    _convert(folder, settings, args)
    print("".join(f"{line}\n" for line in folder.ignored.lines()), end="")


def _from_hdf5(args: argparse.Namespace) -> None:
    settings = _settings(args)
    _convert(Hdf5(args.input), settings, args)


def _from_hf(args: argparse.Namespace) -> None:
    settings = _settings(args)
    columns = (args.image_column, args.caption_column, args.label_column)
    _convert(HuggingFace(args.input, args.subset, args.split, columns), settings, args)


def _read_classes(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        return names
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from None
