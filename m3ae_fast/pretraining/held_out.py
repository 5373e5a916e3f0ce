"""Images of held-out shards that training shards have too: an image with several captions may be in both."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_fast.data.index import MISSING, IndexedShard, group, index_shards
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.data.tar import scan_tar
from m3ae_fast.errors import UserError
from m3ae_fast.progress import track
from m3ae_fast.regular_file import open_regular
from m3ae_fast.shard_tools.member import add_member
from m3ae_fast.shard_tools.same_images import middle
from m3ae_fast.whole_file import whole_file


class _Place(NamedTuple):
    """Where an image is."""

    shard: str
    offset: int
    size: int


def shared_images(train: Sequence[str], val: Sequence[str]) -> dict[str, set[int]]:
    """Return the offsets of the images, by held-out shard, whose bytes a training shard has too. Raises UserError where
    a shard cannot be read."""
    store = ShardStore()
    first, second = (index_shards(shards, store, progress=True) for shards in (train, val))
    sketches: dict[tuple[int, int], list[_Place]] = {}
    for place, sketch in _sketches(second):
        sketches.setdefault(sketch, []).append(place)
    sizes = np.array(sorted({size for size, _ in sketches}))
    title = "looking for held-out images in training shards"
    shared: dict[str, set[int]] = {}
    for place, sketch in _sketches(track(first, title), sizes):
        for other in sketches.get(sketch, ()):
            if other.offset not in shared.get(other.shard, ()) and _digest(place) == _digest(other):
                shared.setdefault(other.shard, set()).add(other.offset)
    return shared


def _sketches(
    entries: Iterable[IndexedShard], sizes: np.ndarray | None = None
) -> Iterator[tuple[_Place, tuple[int, int]]]:
    """Yield the images, where `sizes` are given those of such sizes, each with its size and its middle's checksum."""
    for entry in entries:
        table = entry.table()
        table = table[table["image_offset"] != MISSING]
        if sizes is not None:
            table = table[np.isin(table["image_size"], sizes)]
        with _opened(entry.shard) as file:
            for offset, size in zip(table["image_offset"].tolist(), table["image_size"].tolist()):
                start, length = middle(size)
                piece = os.pread(file.fileno(), length, offset + start)
                yield _Place(entry.shard, offset, size), (size, zlib.crc32(piece))


def _opened(shard: str) -> io.FileIO:
    try:
        return open_regular(shard)
    except OSError as error:
        raise UserError(f"shard {shard}: cannot be read ({error.strerror or error})") from None


def _digest(place: _Place) -> bytes:
    with _opened(place.shard) as file:
        return hashlib.sha256(os.pread(file.fileno(), place.size, place.offset)).digest()


def write_without(shard: str, offsets: set[int], path: Path) -> bool:
    """Write a shard without the samples whose image begins at one of the offsets, unless that was done since the shard
    changed; return whether any sample is left. Raises UserError where `path` cannot be written."""
    members, _ = scan_tar(Path(shard))
    samples = [files for _, files in group(members) if not any(file.offset in offsets for file in files.values())]
    done = path.exists() and path.stat().st_mtime_ns > os.stat(shard).st_mtime_ns
    if samples and not done:
        with _opened(shard) as file, whole_file(path) as partial, tarfile.open(partial, "w") as tar:
            for member in (member for files in samples for member in files.values()):
                add_member(tar, member.name, os.pread(file.fileno(), member.size, member.offset))
    return bool(samples)
