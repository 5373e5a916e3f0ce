"""Selection of held-out samples, whose images must not occur in training samples, not even with another caption.

`split_images` chooses the samples that are held out when shards are made. `shared_images` and `write_without` remove
images that occur in training shards from existing held-out shards.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.index import MISSING, IndexedShard, group, index_shards
from m3ae_fast.data.order import permutation
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.data.tar import Member, scan_tar
from m3ae_fast.shards.duplicate_images import sketch
from m3ae_fast.shards.tar_member import add_member


class _Place(NamedTuple):
    """Location of an image in a shard."""

    shard: str
    offset: int
    size: int


def split_images(images_N: np.ndarray, wanted: int, seed: int = 0) -> np.ndarray:
    """Return a mask of the samples to hold out, bool [N]; either all samples of an image are held out, or none.

    Every image is held out with the same probability, whatever its number of samples. The exceptions are images with
    more than `wanted` samples, which are never held out, because the samples of one such image would already be too
    many. The images are drawn by systematic sampling (Cochran 1977, "Sampling Techniques", chapter 8) in the order of
    their numbers of samples, and in random order among images with equal numbers. Therefore, the expected number of
    held-out samples is `wanted`, except that the number of images is rounded. The actual number differs from the
    expected number by less than the samples of one image: the image with the most samples among those that can be held
    out. At least one image is held out: the one with the fewest samples if all images have too many.

    Args:
        images_N: image number of each sample, int64, N >= 1. Only their equality matters.
        wanted: number of samples to hold out.
        seed: random seed of the draw.
    """
    _, first_I, image_N, samples_I = np.unique(images_N, return_index=True, return_inverse=True, return_counts=True)
    order_I = np.empty_like(first_I)
    # the order depends only on the order in which the images first occur, not on their numbers
    order_I[np.argsort(first_I)] = permutation(len(first_I), seed)
    ascending_I = np.lexsort((order_I, samples_I))
    fitting = ascending_I[samples_I[ascending_I] <= wanted]
    if not len(fitting):
        return image_N == ascending_I[0]
    images = len(fitting)
    drawn = min(images, max(1, round(wanted * images / int(samples_I[fitting].sum()))))
    start = int(permutation(images, seed, 1)[0])  # uniform in 0 .. images - 1
    places = (np.arange(drawn) * images + start) // drawn
    return np.isin(image_N, fitting[places])


def without_whole_classes(held_N: np.ndarray, images_N: np.ndarray, classes_N: np.ndarray) -> np.ndarray:
    """Return the mask of held-out samples, bool [N], after an adjustment: if all samples of a class are held out, the
    images of this class are removed from the mask, because a class without a training sample cannot be evaluated. If
    nothing would be held out any more, the mask is returned unchanged.

    Args:
        held_N: mask of the samples that were drawn, as from `split_images`.
        images_N: image number of each sample.
        classes_N: name of the class of each sample.
    """
    lost_N = held_N & ~np.isin(classes_N, classes_N[~held_N])
    kept_N = held_N & ~np.isin(images_N, images_N[lost_N])
    return kept_N if kept_N.any() else held_N


def shared_images(train: Sequence[str], val: Sequence[str]) -> dict[str, set[int]]:
    """Return, for each held-out shard, the offsets of its images that also occur, byte for byte, in a training shard.
    Raises UserError if a shard cannot be read."""
    store = ShardStore()
    first, second = (index_shards(shards, store, progress=True) for shards in (train, val))
    sketches: dict[tuple[int, int], list[_Place]] = {}
    for place, features in _sketches(second):
        sketches.setdefault(features, []).append(place)
    sizes = np.array(sorted({size for size, _ in sketches}))
    title = "looking for held-out images in training shards"
    shared: dict[str, set[int]] = {}
    for place, features in _sketches(track(first, title), sizes):
        for other in sketches.get(features, ()):
            if other.offset not in shared.get(other.shard, ()) and _digest(place) == _digest(other):
                shared.setdefault(other.shard, set()).add(other.offset)
    return shared


def _sketches(
    entries: Iterable[IndexedShard], sizes: np.ndarray | None = None
) -> Iterator[tuple[_Place, tuple[int, int]]]:
    """Yield each image with its sketch. If `sizes` is given, only images with one of these numbers of bytes are
    yielded."""
    for entry in entries:
        table = entry.table()
        table = table[table["image_offset"] != MISSING]
        if sizes is not None:
            table = table[np.isin(table["image_size"], sizes)]
        with _opened(entry.shard) as file:
            for offset, size in zip(table["image_offset"].tolist(), table["image_size"].tolist()):
                yield _Place(entry.shard, offset, size), sketch(size, partial(_piece, file.fileno(), offset))


def _piece(fd: int, offset: int, length: int, start: int) -> bytes:
    """Return `length` bytes of the image at `offset`, from its byte `start` on."""
    return os.pread(fd, length, offset + start)


def _opened(shard: str) -> io.FileIO:
    try:
        return open_regular(shard)
    except OSError as error:
        raise UserError(f"shard {shard}: cannot be read ({error.strerror or error})") from None


def _digest(place: _Place) -> bytes:
    with _opened(place.shard) as file:
        return hashlib.sha256(os.pread(file.fileno(), place.size, place.offset)).digest()


def write_without(shard: str, offsets: set[int], path: Path) -> bool:
    """Write a shard without the samples whose image begins at one of the offsets, unless `path` already exists and is
    up to date. Return whether any sample is left. Raises UserError if `path` cannot be written."""
    samples = group(scan_tar(Path(shard))[0])
    others = (files.values() for _, files in samples if not any(file.offset in offsets for file in files.values()))
    kept = [member for files in others for member in files]
    if kept and not _holds(path, kept, os.stat(shard).st_mtime_ns):
        with _opened(shard) as file, atomic_write(path) as partial, tarfile.open(partial, "w") as tar:
            for member in kept:
                add_member(tar, member.name, os.pread(file.fileno(), member.size, member.offset))
    return bool(kept)


def _holds(path: Path, members: Sequence[Member], since: int) -> bool:
    """Return whether the shard `path` was written after `since` (in ns) and has members with the same names and
    sizes."""
    if not path.exists() or path.stat().st_mtime_ns <= since:
        return False
    return [(own.name, own.size) for own in scan_tar(path)[0]] == [(member.name, member.size) for member in members]
