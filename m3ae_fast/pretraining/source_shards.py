"""The shards that a run reads. They are found in SOURCE, or created from a folder of images, an HDF5 file or a Hugging
Face dataset."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.base.wording import counted
from m3ae_fast.config import Range
from m3ae_fast.data.manifest import is_manifest
from m3ae_fast.data.shard_names import expand, is_remote
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.pretraining.automatic_settings import Shards
from m3ae_fast.pretraining.image_settings import range_of, require_similar_values
from m3ae_fast.pretraining.options import PretrainOptions
from m3ae_fast.shards.held_out import shared_images, write_without
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.output_claim import MANIFEST, manifest_text
from m3ae_fast.shards.overview import parts_of, show
from m3ae_fast.shards.sources.caption_table import ImagesMissing
from m3ae_fast.shards.sources.columns import CAPTION_OPTION, NO_CAPTIONS, NoColumns
from m3ae_fast.shards.sources.folder_layout import HELD_OUT, TEST, TRAIN, VAL, split_of_file, split_of_folder
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.sources.registry import kind_of_source, open_source
from m3ae_fast.shards.sources.table_rows import READERS
from m3ae_fast.shards.writer import Settings, are_reproduced, convert, manifest_of

SHARDS, CLEANED = "shards", "held-out"  # sub-folders of the run folder
# fraction and maximum number of samples that are held out if the source has no held-out split
_FRACTION, _MOST_HELD_OUT = 0.1, 5000


def find_shards(
    options: PretrainOptions,
    value_range: Range | None = None,
    *,
    kept: Sequence[str] = (),
    start_range: Range | None = None,
) -> Shards:
    """Return the shards of a source. If the source does not consist of shards, they are created in the run folder.

    Args:
        options: the options of `pretrain`, of which the source, the run folder, the captions, the columns, the group
            and `val` are used. `val` names the held-out shards of a source that consists of shards. If it is empty, the
            shards whose names contain the name of a held-out split are held out or, if there are none, the last shards.
        value_range: values of black and white in images with more than 8 bits per channel; None: detected.
        kept: the training shards of an existing run in the run folder; empty: there is no such run.
        start_range: value range of the weights from which the run starts; it is used if `value_range` is None. None:
            the run starts from random weights, or its weights have no value range.

    Raises:
        UserError: the source does not exist, cannot be used, or is not the source of the existing run; or the pixel
            values of its images do not suit `start_range`.
    """
    source, out, captions, val, group = options.source, options.out, options.captions, options.val, options.group
    folder = Path(source)
    tars = sorted(str(path.resolve()) for path in folder.glob("*.tar")) if folder.is_dir() else []
    if tars or (_names_shards(source) and not folder.is_dir()):
        if captions:
            raise UserError(f"--captions {captions}: can be used only if SOURCE is a folder of images; {source} is not")
        if (options.image_column, options.caption_column) != (None, None):
            raise UserError(f"--image-column and --caption-column cannot be used: {source} consists of shards")
        if group is not None:
            raise UserError(
                f"--group {group}: {source} consists of shards, which are held out as a whole; use --group when the "
                "shards are made, and pass the held-out shards with --val"
            )
        given = tars or [source]
        names = [*given, *(() if not kept or any(map(is_manifest, given)) else expand(given))]
        _require_source(source, out, sorted({*map(_path, kept)} - {*map(_path, names)}))
        return _split(given, list(val), out)
    _require_source(source, out, [shard for shard in map(_path, kept) if shard.parent != (out / SHARDS).resolve()])
    if val:
        raise UserError(f"--val: can be used only if SOURCE consists of shards; {source} does not")
    if source and folder.is_dir() and folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(
            f"--out {out}: is inside {source}, so figures written to it would be read as input images; "
            "choose a folder outside SOURCE"
        )
    records, notes = _open(options)
    made = _made(records, options, [*notes, *records.notes, *records.ignored.lines()], value_range, start_range)
    return replace(made, unlabelled=records.unlabelled)


def _require_source(source: str, out: Path, others: Sequence[Path]) -> None:
    """Raise UserError if there are `others`: training shards of the run in `out` that do not belong to the source."""
    if others:
        raise UserError(
            f"{source}: the run in {out} has another SOURCE, with shards such as {others[0]}; choose another --out"
        )


def _path(shard: str) -> Path:
    """Return a shard's name in a form that can be compared: the resolved path of a local file."""
    return Path(shard) if is_remote(shard) else Path(shard).expanduser().resolve()


def _names_shards(source: str) -> bool:
    return source.endswith(".tar") or ".tar" in source.rpartition("/")[2] or is_remote(source) or is_manifest(source)


def _open(options: PretrainOptions) -> tuple[Records, list[str]]:
    """Return the records of a source that does not consist of shards, and notes about them. If no caption table is
    given and a folder of images contains one, the captions and fields are read from this table, or only the fields if
    the table has no column of captions."""
    source, captions, image, caption = options.source, options.captions, options.image_column, options.caption_column
    kind = kind_of_source(source)
    if captions and kind != "folder":
        raise UserError(f"--captions {captions}: can be used only if SOURCE is a folder of images; {source} is not")

    def records(captions: Path | None = None, caption_column: str | None = caption) -> Records:
        read = SourceOptions(captions=captions, image_column=image, caption_column=caption_column)
        return open_source(source, read, kind)

    if captions or kind != "folder":
        return records(captions), []
    tables = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in READERS)
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{source}: has several tables ({names}); choose one with --captions")
    if not tables:
        return records(), []
    (table,) = tables
    try:
        return _with_table(records, table, caption)
    except NoColumns as error:
        if (image, caption) != (None, None):
            raise
        note = f"{table} is not used: none of its columns ({error.columns}) has a usual name such as file_name"
    except ImagesMissing as error:
        if error.has_captions or (image, caption) != (None, None):
            raise
        note = f"{table} is not used: {str(error).partition(': ')[2]}"
    return records(), [note]


def _with_table(records: Callable[..., Records], table: Path, caption: str | None) -> tuple[Records, list[str]]:
    """Return the records of a folder with the table that it contains, and a note about the table. `records`: function
    that opens the folder; `caption`: column of the captions. Raises NoColumns if the table has no column of images."""
    try:
        read = "fields" if caption == NO_CAPTIONS else "captions and fields"
        return records(table), [f"{read} are read from {table}"]
    except NoColumns as error:
        if error.option != CAPTION_OPTION:
            raise
        note = (
            f"fields, but no captions, are read from {table}: none of its columns ({error.columns}) has a usual name "
            f"such as caption; if one of them contains captions, specify it with {CAPTION_OPTION}"
        )
    return records(table, NO_CAPTIONS), [note]


def _split(train: list[str], val: list[str], out: Path) -> Shards:
    """Split shards into training and held-out shards. The held-out shards are those in `val`. If `val` is empty, the
    held-out shards are those with the name of a held-out split or, if there are none, the last tenth of the shards.
    Samples are removed from this last tenth if their image also occurs in a training shard. A single shard is used for
    training only."""
    if val:
        return Shards(train, val, overlap(train, val))
    names = train if any(map(is_manifest, train)) else expand(train)
    if named := _split_by_names(names):
        return named
    if len(names) == 1:
        note = "no samples are held out, because there is only one shard; to evaluate, pass other shards with --val"
        return Shards(names, [], [note])
    return _hold_out_last(names, out)


def _split_by_names(names: list[str]) -> Shards | None:
    """Split shards by the splits named in their file and folder names. Return None if there would be no training shards
    or no held-out shards."""
    folders = zip(*(name.split("/")[:-1] for name in names))
    # Folders that contain all shards do not indicate a split.
    common = len([*takewhile(lambda level: len(set(level)) == 1, folders)])
    splits = {name: _split_named(name.split("/")[common:]) for name in names}
    kept = [name for name, split in splits.items() if split in (None, TRAIN)]
    evaluated = VAL if VAL in splits.values() else TEST
    held = [name for name, split in splits.items() if split == evaluated]
    if not (held and kept):
        return None
    notes = [f"held out because of their names: {len(held):,} of {len(names):,} shards, such as {held[0]}"]
    if apart := [name for name in names if name not in (*kept, *held)]:
        tests = f"{counted(len(apart), 'test shard')}, such as {apart[0]}"
        notes.append(f"not used, because there is also a validation split: {tests}")
    return Shards(kept, held, notes + overlap(kept, held))


def _hold_out_last(names: list[str], out: Path) -> Shards:
    """Hold out the last tenth of the shards. If an image of a held-out shard also occurs in a training shard, the
    held-out shard is replaced with a copy in `out` without this image, unless the comparison would require a
    download."""
    count = max(1, round(_FRACTION * len(names)))
    kept, held = names[:-count], names[-count:]
    note = f"held out: the last {count:,} of {len(names):,} shards"
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
        note += f", except {_samples(shared)} whose image also occurs in other shards"
    if not left:
        note = (
            "no validation set: all images of the last shards also occur in other shards; pass different shards with "
            "--val"
        )
    return Shards(kept, left, [note])


def _split_named(path: list[str]) -> str | None:
    """Return the split that the name of a shard or of a folder above it indicates; None if there is none."""
    *folders, name = path
    return split_of_file(name) or next(filter(None, map(split_of_folder, folders)), None)


def _out_of_reach(shards: Sequence[str]) -> bool:
    """Return whether the images of shards cannot be compared without downloading them."""
    store = ShardStore()
    return any(is_manifest(name) or store.is_staged(name) for name in shards)


def overlap(train: Sequence[str], val: Sequence[str]) -> list[str]:
    """Return a list that contains a note if there are held-out samples whose image also occurs in a training shard."""
    if any(map(is_manifest, [*train, *val])):
        return []
    train, val = expand(list(train)), expand(list(val))
    if _out_of_reach([*train, *val]):
        return []
    shared = shared_images(train, val)
    count = sum(map(len, shared.values()))
    return [f"held-out samples whose image also occurs in training shards: {count:,}"] if shared else []


def _samples(shared: dict[str, set[int]]) -> str:
    return counted(sum(map(len, shared.values())), "sample")


def _made(
    source: Records,
    options: PretrainOptions,
    notes: list[str],
    value_range: Range | None,
    start_range: Range | None,
) -> Shards:
    """Create the shards that are missing in the run folder, and return all shards. If the source has changed since
    shards were created, all shards are replaced; in this case, UserError is raised if a run has already begun with the
    old shards, or if `pretrain` has not made them. A source counts as unchanged if the same shards would be created
    from it, whatever the modification times of its files."""
    name, out = options.source, options.out
    folder, before = out / SHARDS, _manifest(out / SHARDS)
    parts = parts_of(source, _uses(source))
    kinds = [kind for part in parts for kind in part.kinds]
    if value_range is None and start_range is not None:
        require_similar_values(kinds, start_range)  # must be checked before the values are converted to 8 bits
        value_range = start_range
    value_range = value_range or range_of(kinds)
    begun = bool(checkpoint.saved_steps(out))
    labels = None if options.labels == "cls" else options.labels
    if begun and _is_of_run(before):
        labels = before["settings"].get("labels")  # --labels has no effect after a run has begun
    settings = _settings(source, value_range, options.group, labels)
    now = manifest_of(source, settings)
    if before is None:
        show(name, parts)
    changed = before is not None and before != json.loads(json.dumps(now))
    if changed and begun:
        if not are_reproduced(source, folder, settings):
            raise UserError(
                f"{name} or --group: has changed since the run in {out} began; choose another --out, or continue with "
                f"the old shards: m3ae-fast train --config {out / 'config.json'} --resume auto"
            )
        write_text_atomically(folder / MANIFEST, manifest_text(now))
    elif changed:
        if not _is_of_run(before):
            raise UserError(f"{folder}: contains shards that pretrain has not made; choose another --out")
        shutil.rmtree(folder)
        (out / "config.json").unlink(missing_ok=True)  # a dry run writes shards, but no config
        notes = [*notes, f"{name}, --group or --labels has changed, so the shards are created again"]
        show(name, parts)
    made = convert(source, folder, settings, len(os.sched_getaffinity(0)))
    train, held, apart = _roles({path.name.rpartition("-")[0] for path in made.shards})
    whole = folder.resolve()
    lines = [*notes, *made.notes, *made.tally.lines()]
    if apart:
        lines.append(f"{', '.join(apart)}: used neither for training nor for evaluation; the shards are in {folder}")
    if not held:
        lines.append("no samples are held out: all reported losses and accuracies will be on training data")
    kept, val = ([str(whole / f"{split}-*.tar")] if split else [] for split in (train, held))
    if not settings.held_out:  # if samples were held out here, all samples of an image are in the same split
        lines += overlap(kept, val) if val else []
    return Shards(kept, val, lines, shown=True, value_range=value_range)


def _is_of_run(manifest: Any) -> bool:
    """Return whether `pretrain` has made the shards with this manifest."""
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    return isinstance(settings, dict) and settings.get("of_run") is True


def _uses(source: Records) -> dict[str, str]:
    """Return a description of the purpose of each split, by name."""
    if len(source.splits) == 1:
        return dict.fromkeys(source.splits, "used for training, with a part held out")
    train, held, apart = _roles(source.splits)
    return {train: "trained on", held or "": "held out"} | dict.fromkeys(apart, "not used")


def _roles(splits: Collection[str]) -> tuple[str, str | None, list[str]]:
    """Return the split to train on, the split that is held out (None if there is none), and all other splits."""
    held_out = [split for split in HELD_OUT if split in splits]
    others = sorted(splits, key=lambda split: (split in held_out, split != TRAIN, split))
    held = next((split for split in held_out if split != others[0]), None)
    return others[0], held, [split for split in others[1:] if split != held]


def _settings(source: Records, value_range: Range | None, group: str | None, labels: str | None) -> Settings:
    """Return the settings for creating shards: some samples are held out if the source has only one split. Raises
    UserError if the source has several splits, but none to train on, or if it has splits and `group` is set."""
    if len(source.splits) > 1 and all(split in HELD_OUT for split in source.splits):
        found = " and ".join(source.splits)
        raise UserError(f"SOURCE has the splits {found}, but no split to train on; pass one of the splits as SOURCE")
    samples = sum(source.splits.values())
    alone = len(source.splits) == 1 and samples > 1
    if group is not None and len(source.splits) > 1:
        raise UserError(f"--group {group}: SOURCE is already split ({', '.join(source.splits)}); leave out --group")
    held_out = min(_FRACTION, _MOST_HELD_OUT / samples) if alone else 0.0
    if not alone:
        group = labels = None
    return Settings(held_out=held_out, group=group, value_range=value_range, of_run=True, labels=labels)


def _manifest(folder: Path) -> Any:
    try:
        return read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
