"""from-folder, from-hdf5, from-hf: shards of what others have."""

from __future__ import annotations

import argparse
from pathlib import Path

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.shards.overview import parts_of, show
from m3ae_fast.shards.problem_counts import Tally
from m3ae_fast.shards.settings import Settings
from m3ae_fast.shards.sources.folder import Folder
from m3ae_fast.shards.sources.hdf5 import Hdf5
from m3ae_fast.shards.sources.huggingface import HuggingFace
from m3ae_fast.shards.sources.records import Records
from m3ae_fast.shards.writer import convert, describe_conversion


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


def from_folder(args: argparse.Namespace) -> None:
    settings = _settings(args)
    columns = (args.image_column, args.caption_column)
    folder = Folder(args.input, args.captions, columns, _read_classes(args.classes), args.flat)
    show(str(args.input), parts_of(folder, {split: f"{split}-*.tar" for split in folder.splits}))
    print("".join(f"note: {note}\n" for note in folder.notes), end="", flush=True)
    _convert(folder, settings, args)
    _tell(folder.ignored)


def from_hdf5(args: argparse.Namespace) -> None:
    settings = _settings(args)
    _convert(Hdf5(args.input), settings, args)


def from_hf(args: argparse.Namespace) -> None:
    settings = _settings(args)
    columns = (args.image_column, args.caption_column, args.label_column)
    dataset = HuggingFace(args.input, args.subset, args.split, columns)
    _convert(dataset, settings, args)
    _tell(dataset.ignored)


def _tell(ignored: Tally) -> None:
    print("".join(f"{line}\n" for line in ignored.lines()), end="")


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
