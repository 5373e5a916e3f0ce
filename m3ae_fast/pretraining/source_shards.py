"""What SOURCE is, a folder, shards or a Hugging Face data set, and the shards that a run reads of it."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.config import Range
from m3ae_fast.data.manifest import is_manifest
from m3ae_fast.data.shards import ShardStore, expand, is_remote
from m3ae_fast.pretraining.automatic_settings import Shards
from m3ae_fast.pretraining.image_kind import range_of
from m3ae_fast.shards.held_out import shared_images, write_without
from m3ae_fast.shards.output_claim import MANIFEST
from m3ae_fast.shards.overview import parts_of, show
from m3ae_fast.shards.settings import Settings
from m3ae_fast.shards.sources.caption_table import READERS, NoColumns, read_captions
from m3ae_fast.shards.sources.folder import Folder, ImagesMissing
from m3ae_fast.shards.sources.folder_layout import HELD_OUT, TEST, TRAIN, VAL, split_of_file, split_of_folder
from m3ae_fast.shards.sources.huggingface import HuggingFace
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.sources.recognition import is_saved_dataset
from m3ae_fast.shards.writer import convert, manifest_of

SHARDS, CLEANED = "shards", "held-out"  # folders of a run folder
_FRACTION, _MOST_HELD_OUT = 0.1, 5000  # of the samples, where they have no such split


def find_shards(
    source: str, out: Path, captions: Path | None, val: Sequence[str], image_range: Range | None = None
) -> Shards:
    """Return the shards of `source`, made in the run folder `out` where it is not shards itself.

    Args:
        source: a folder of images or of shards, shards as a config names them, or a data set's name.
        out: the run folder.
        captions: a table of them, for a folder of images; None: one in the folder, or .txt files.
        val: held-out shards, where `source` is shards; empty: those it has of that name, or the last ones.
        image_range: of images of more than 8 bits.

    Raises:
        UserError: there is no such source, it cannot be used, or it has changed since a run in `out` began.
    """
    folder = Path(source)
    tars = sorted(str(path.resolve()) for path in folder.glob("*.tar")) if folder.is_dir() else []
    if tars or _names_shards(source):
        if captions:
            raise UserError(f"--captions {captions}: can be used only if SOURCE is a folder of images; {source} is not")
        return _split(tars or [source], list(val), out)
    if val:
        raise UserError(f"--val: can be used only if SOURCE is shards; {source} is not")
    if folder.is_dir() and not is_saved_dataset(folder):
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(
                f"--out {out}: is inside {source}, so figures written to it would be read as input images; "
                "choose a folder outside SOURCE"
            )
        pictures, notes = (Folder(folder, captions), []) if captions else _with_table_in(folder)
        made = _made(pictures, source, out, [*notes, *pictures.notes, *pictures.ignored.lines()], image_range)
        return replace(made, unlabelled=_without_classes(pictures))
    if not folder.is_dir() and (folder.exists() or source.startswith((".", "/", "~")) or source.endswith("/")):
        raise UserError(
            f"{source}: is not a folder, and neither shards nor the name of a Hugging Face data set{_similar(folder)}"
        )
    if captions:
        raise UserError(f"--captions {captions}: can be used only if SOURCE is a folder of images; {source} is not")
    near = _similar(folder)
    if near and "/" not in source:  # the hub would be asked for a minute where there is no network
        raise UserError(f"{source}: no such folder here{near}")
    try:
        records = HuggingFace(source, None, None, (None, None, None))
    except UserError as error:
        raise UserError(f"{source}: no such folder here{near}; as a data set's name: {error}") from None
    return _made(records, source, out, records.ignored.lines(), image_range)


def _similar(folder: Path) -> str:
    """Return a question after a folder that may be meant, or the way to give a table; "" if neither is likely."""
    if folder.is_file() and folder.suffix.lower() in READERS:
        return f"; a table goes with the folder of its images: pretrain FOLDER --captions {folder}"
    parent = folder.parent
    beside = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _names_shards(source: str) -> bool:
    return source.endswith(".tar") or ".tar" in source.rpartition("/")[2] or is_remote(source) or is_manifest(source)


def _without_classes(pictures: Folder) -> str:
    """Return why images have no classes, "" if they have some."""
    if pictures.classes is not None:
        return ""
    if pictures.outside:
        return f"sub-folders are classes only if every image is in one, and {pictures.outside} is in none"
    return "there are not several sub-folders, which would be classes"


def _with_table_in(folder: Path) -> tuple[Folder, list[str]]:
    """Return the images of a folder, with the one table at its top, if any, and notes about it."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder}: has several tables ({names}); name that of the captions with --captions")
    if not tables:
        return Folder(folder), []
    try:
        pictures = Folder(folder, tables[0])
    except NoColumns:
        return Folder(folder), [f"{tables[0]} is not used: it has no columns such as file_name and caption"]
    except ImagesMissing as error:
        if any(row.captions is not None for row in read_captions(tables[0])[:1]):
            raise
        return Folder(folder), [f"{tables[0]} is not used: {str(error).partition(': ')[2]}"]
    return pictures, [f"captions and fields are those of {tables[0]}"]


def _split(train: list[str], val: list[str], out: Path) -> Shards:
    """Hold out shards: those given, or named so, or the last tenth, without images that the others have too."""
    names = train if any(map(is_manifest, train)) else expand(train)
    if val:
        return Shards(train, val, _overlap(train, val))
    folders = zip(*(name.split("/")[:-1] for name in names))
    common = len([*takewhile(lambda level: len(set(level)) == 1, folders)])  # which say nothing of a shard
    named = {name: _split_named(name.split("/")[common:]) for name in names}
    kept = [name for name, split in named.items() if split in (None, TRAIN)]
    evaluated = VAL if VAL in named.values() else TEST
    held = [name for name, split in named.items() if split == evaluated]
    apart = [name for name in names if name not in (*kept, *held)]
    if held and kept:
        notes = [f"held out by their names: {len(held):,} of {len(names):,} shards, such as {held[0]}"]
        if apart:
            notes.append(
                f"not used, since there is a validation split too: {len(apart):,} of a test, such as {apart[0]}"
            )
        return Shards(kept, held, notes + _overlap(kept, held))
    if len(names) == 1:
        note = "nothing is held out of one file of shards: name others with --val to see losses and accuracies"
        return Shards(names, [], [note])
    count = max(1, round(_FRACTION * len(names)))
    kept, held = names[:-count], names[-count:]
    note = f"the last {count:,} of {len(names):,} shards are held out"
    if _out_of_reach(names):
        return Shards(kept, held, [note])
    shared = shared_images(kept, held)
    left = []
    for number, name in enumerate(held):
        path = out / CLEANED / f"{number:05d}-{Path(name).name}"
        if name not in shared:
            left.append(name)
        elif write_without(name, shared[name], path):
            left.append(str(path.resolve()))
    if shared:
        note += f" but for {_samples(shared)} whose image other shards have too"
    if not left:
        note = "no validation set: all images of the last shards also occur in others; pass separate shards with --val"
    return Shards(kept, left, [note])


def _split_named(path: list[str]) -> str | None:
    """Return the split that a shard's name says, or a folder above it; None if none does."""
    *folders, name = path
    return split_of_file(name) or next(filter(None, map(split_of_folder, folders)), None)


def _out_of_reach(shards: Sequence[str]) -> bool:
    """Return whether images cannot be compared without fetching them."""
    store = ShardStore()
    return any(is_manifest(name) or store.is_staged(name) for name in shards)


def _overlap(train: Sequence[str], val: Sequence[str]) -> list[str]:
    """Return a note about samples that the user holds out, but whose images are trained on."""
    if any(map(is_manifest, [*train, *val])):
        return []
    train, val = expand(list(train)), expand(list(val))
    if _out_of_reach([*train, *val]):
        return []
    shared = shared_images(train, val)
    return [f"held out, but with an image that training shards have too: {_samples(shared)}"] if shared else []


def _samples(shared: dict[str, set[int]]) -> str:
    count = sum(map(len, shared.values()))
    return f"{count:,} sample{'s' * (count != 1)}"


def _made(source: Records, name: str, out: Path, notes: list[str], image_range: Range | None) -> Shards:
    """Write the shards that `out` lacks; those of other pictures go where no training has begun."""
    folder, before = out / SHARDS, _manifest(out / SHARDS)
    parts = parts_of(source, _uses(source))
    image_range = image_range or range_of([kind for part in parts for kind in part.kinds])
    settings = _settings(source, image_range)
    now = manifest_of(source, settings)
    if before is None:
        show(name, parts)
    if before is not None and before != json.loads(json.dumps(now)):
        if checkpoint.saved_steps(out):
            raise UserError(
                f"{name}: has changed since the run in {out} began; choose another --out, or continue with the old  "
                f"shards: m3ae-fast train --config {out / 'config.json'} --resume auto"
            )
        if not (out / "config.json").exists():
            raise UserError(f"{folder}: holds shards of something else; remove it, or choose another --out")
        shutil.rmtree(folder)
        (out / "config.json").unlink()
        notes = [*notes, f"{name} has changed, so its shards are created again"]
        show(name, parts)
    made = convert(source, folder, settings, len(os.sched_getaffinity(0)))
    train, held, apart = _roles({path.name.rpartition("-")[0] for path in made.shards})
    whole = folder.resolve()
    lines = notes + made.tally.lines()
    if apart:
        lines.append(f"{', '.join(apart)}: neither trained on nor evaluated; its shards are in {folder}")
    if not held:
        lines.append("no samples are held out: all reported losses and accuracies will be on training data")
    kept, val = ([str(whole / f"{split}-*.tar")] if split else [] for split in (train, held))
    return Shards(kept, val, lines, shown=True, image_range=image_range)


def _uses(source: Records) -> dict[str, str]:
    """Return a line that describes each split."""
    if len(source.splits) == 1:
        return dict.fromkeys(source.splits, "trained on, part of it held out")
    train, held, apart = _roles(source.splits)
    return {train: "trained on", held or "": "held out"} | dict.fromkeys(apart, "not used")


def _roles(splits: Collection[str]) -> tuple[str, str | None, list[str]]:
    """Return the split to train on, the one that is held out, None if there is none, and those that are neither."""
    held_out = [split for split in HELD_OUT if split in splits]
    others = sorted(splits, key=lambda split: (split in held_out, split != TRAIN, split))
    held = next((split for split in held_out if split != others[0]), None)
    return others[0], held, [split for split in others[1:] if split != held]


def _settings(source: Records, image_range: Range | None) -> Settings:
    """Hold out a part of a source that has one split. Raises UserError if it has several, but none to train on."""
    if len(source.splits) > 1 and all(split in HELD_OUT for split in source.splits):
        found = " and ".join(source.splits)
        raise UserError(f"SOURCE has the splits {found}, but none to train on; name one of them as SOURCE")
    samples = sum(source.splits.values())
    alone = len(source.splits) == 1 and samples > 1
    return Settings(held_out=min(_FRACTION, _MOST_HELD_OUT / samples) if alone else 0.0, image_range=image_range)


def _manifest(folder: Path) -> Any:
    try:
        return read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
