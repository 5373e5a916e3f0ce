"""Manifests: sample counts of many shards in one memory-mapped array, so that a run can open the shards without reading
them.

A manifest is a .npy file with a row for each shard: `name`, `samples` (number of samples with an image or a caption),
`size` (bytes of the tar; 0: unknown) and `kind`, an index into KINDS. The counts determine the sample order. The
offsets of samples are read from each shard when it is downloaded; if a shard has fewer samples than its manifest
states, the missing ones count as skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args, overload

import numpy as np

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.wording import counted
from m3ae_fast.data.index import VERSION, IndexedShard, Modality, Summary, index_shards
from m3ae_fast.data.order import permutation
from m3ae_fast.data.shard_names import expand, is_remote
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.process.ranks import Ranks, Waiting

T = TypeVar("T")
KINDS: tuple[Modality, ...] = get_args(Modality)
UNREAD = len(KINDS)  # kind of a shard whose samples could not be counted
SUFFIX = ".npy"
_MAX_NAME = 1 << 12  # maximum number of bytes of a shard's name
# maximum number of samples per shard; a larger shard would have at least 64 GB, and the sample order could not be
# computed
_MAX_SAMPLES = 1 << 26
_NO_SIDECAR = Path()  # placeholder until the shard is indexed


@dataclass(frozen=True)
class CountedShard(IndexedShard):
    """A shard of a manifest, which is downloaded and indexed when it is first read."""

    store: ShardStore

    def located(self) -> IndexedShard:
        return index_shards([self.shard], self.store)[0]

    def table(self) -> np.ndarray:
        return self.located().table()

    def reindexed(self, store: ShardStore) -> IndexedShard:
        return self.located().reindexed(store)


class CountedShards(Sequence[IndexedShard]):
    """The shards of a manifest as a sequence; entries are created on access."""

    def __init__(self, rows: np.ndarray, store: ShardStore):
        self.rows, self.store = rows.view(np.ndarray), store  # row access is faster than in a memmap

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> IndexedShard: ...
    @overload
    def __getitem__(self, index: slice) -> CountedShards: ...
    def __getitem__(self, index: int | slice) -> IndexedShard | CountedShards:
        if isinstance(index, slice):
            return CountedShards(self.rows[index], self.store)
        name, samples, size, number = self.rows[index].item()
        kind = KINDS[number]
        images, captions = (0 if kind == alone else samples for alone in ("text", "image"))
        # for "any", the number of pairs is unknown
        paired = {"paired": samples, "any": max(samples - 1, 0)}.get(kind, 0)
        summary = Summary(VERSION, size, 0, samples, images, captions, paired, {}, None)
        return CountedShard(name.decode(), summary, _NO_SIDECAR, self.store)

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of samples in each shard, int64."""
        return self.rows["samples"].astype(np.int64)

    @property
    def kinds(self) -> list[Modality]:
        """Return the modality of each shard. Raises IndexError if a shard could not be read."""
        return [KINDS[kind] for kind in self.rows["kind"].tolist()]


def rows_of(names: Sequence[str], counts: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the rows of a manifest for the shards `names` with `counts` (samples, size, kind): a structured array
    [shards] with the fields of the module's docstring."""
    encoded = [name.encode() for name in names]
    width = max([1, *map(len, encoded)])
    dtype = [("name", f"S{width}"), ("samples", "<u4"), ("size", "<u8"), ("kind", "u1")]
    return np.array([(name, *row) for name, row in zip(encoded, counts, strict=True)], dtype=dtype)


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of all parts as one array, in the order of the parts."""
    if len(parts) == 1:
        return parts[0]
    widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return np.concatenate([part.astype(widest) for part in parts])


def write(path: Path, rows: np.ndarray) -> None:
    """Write a manifest. Raises UserError if that fails."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.save(file, rows, allow_pickle=False)


def read(path: Path) -> np.ndarray:
    """Return the memory-mapped rows of a manifest. Raises UserError if the file cannot be read, is not a manifest, is
    damaged, or states more than 2^26 samples for a shard."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"manifest {path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # NumPy's parser raises many kinds of errors for foreign headers
        raise UserError(f"manifest {path}: is damaged ({' '.join(str(error).split())[:200]})") from None
    width = rows.dtype["name"].itemsize if rows.dtype.names and "name" in rows.dtype.names else 0
    if not 0 < width <= _MAX_NAME or rows.ndim != 1 or rows.dtype != rows_of(["x" * width], [(0, 0, 0)]).dtype:
        raise UserError(
            f"manifest {path}: is a .npy file but not a manifest; create one with m3ae-fast shards table --out"
        )
    try:
        rows["name"].tobytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"manifest {path}: is damaged (the name of a shard is not UTF-8)") from None
    if len(rows) and (rows["kind"].max() > UNREAD or rows["samples"][rows["kind"] == UNREAD].any()):
        raise UserError(f"manifest {path}: is damaged (a shard has an unknown kind, or is unread but has samples)")
    if len(rows) and (most := rows["samples"].max()) > _MAX_SAMPLES:
        raise UserError(f"manifest {path}: states {most:,} samples for one shard; the maximum is {_MAX_SAMPLES:,}")
    return rows


def is_manifest(patterns: str | Sequence[str]) -> bool:
    """Return whether `patterns` are names of manifests. Raises UserError if they mix manifests and shards."""
    each = [patterns] if isinstance(patterns, str) else patterns
    manifests = [pattern for pattern in each if pattern.endswith(SUFFIX)]
    if manifests and len(manifests) < len(each):
        raise UserError(f"shards {each!r}: mixes manifests and tar files; use separate sources for them")
    return bool(manifests)


def read_all(patterns: str | list[str]) -> np.ndarray:
    """Return the rows of the manifests in `patterns`. Raises UserError as `read` does."""
    return join([read(Path(path)) for path in expand(patterns)])


def count(names: Sequence[str], store: ShardStore, progress: bool = False) -> tuple[np.ndarray, list[Skipped]]:
    """Return the manifest rows of the shards, and a list of the unreadable or incomplete shards. Shards without an
    index are indexed; remote shards are downloaded for this purpose. Raises UserError as `index_shards` does."""
    lost: list[Skipped] = []
    return rows_of_indexed(names, index_shards(names, store, progress, lost), lost)


def rows_of_indexed(
    names: Sequence[str], indexed: Sequence[IndexedShard], lost: Sequence[Skipped]
) -> tuple[np.ndarray, list[Skipped]]:
    """Return the manifest rows of the shards `names`, of which `indexed` could be read and `lost` could not, and a list
    of the unreadable or incomplete shards."""
    found = {entry.shard: entry.summary for entry in indexed}
    damaged = [
        Skipped(name, "", f"the tar {s.damage}; {s.samples} of its samples are counted")
        for name, s in found.items()
        if s.damage
    ]
    unread = (0, 0, UNREAD)
    summaries = [found.get(name) for name in names]
    counts = [(s.samples, s.size, KINDS.index(s.modality)) if s else unread for s in summaries]
    return rows_of(names, counts), [*lost, *damaged]


def part_of(names: Sequence[T], number: int, parts: int) -> Sequence[T]:
    """Return the `number`-th of `parts` equal parts, counted from 0."""
    return names[number * len(names) // parts : (number + 1) * len(names) // parts]


def cached(names: Sequence[str], store: ShardStore) -> Path:
    """Return the path of the cached manifest that a run creates for these shards. The path depends on the names of the
    shards and, for local files, on their sizes and modification times."""
    identities = (name if is_remote(name) else store.name(name) for name in names)
    digest = hashlib.sha256("\n".join(identities).encode()).hexdigest()[:16]
    return store.cache_dir / "manifests" / (digest + SUFFIX)


def prepare(
    patterns: str | list[str],
    store: ShardStore,
    ranks: Ranks,
    waiting: Waiting = nullcontext,
    key: tuple[int, int] = (0, 0),
) -> None:
    """If some of the shards are remote or compressed, write a manifest of all shards on every node. Each rank counts
    the samples of an equal part of the shards. Nothing is done if all nodes already have the same manifest, or if
    `patterns` names manifests. Every rank must call this function.

    Args:
        patterns: the shards of a source.
        store: the shard cache of this rank's node.
        ranks: the ranks of the run.
        waiting: context that is entered while this rank waits for other ranks.
        key: the seed and the number of the source. The shards are split over nodes as in training, where they are split
            over lanes. Each node therefore counts the shards that it will train on, and need not download them again if
            they fit into its cache.

    Raises:
        UserError: a rank cannot write the manifest, or no shard can be read. The error is raised on every rank.
    """
    names = [] if is_manifest(patterns) else expand(patterns)
    path = cached(names, store)
    if not any(map(store.must_be_copied, names)):
        return
    with waiting():
        held = ranks.gather(_held(path))  # nodes may have counted at different times or in different runs
    if held[0] is not None and len(set(held)) == 1:
        return

    order = permutation(len(names), *key)

    def part() -> tuple[np.ndarray, list[Skipped]]:
        own = [names[number] for number in part_of(order.tolist(), ranks.rank, ranks.world)]
        rows, lost = count(own, store, ranks.is_main)
        return rows, lost[:1]

    own = ranks.together(part, waiting)
    with waiting():
        found = ranks.gather(own)
    rows = join([rows for rows, _ in found])[np.argsort(order)]
    if (rows["kind"] == UNREAD).all():
        raise none_read(next(first for _, lost in found for first in lost), len(rows))
    ranks.together(lambda: write(path, rows) if ranks.local_rank == 0 else None, waiting)


def none_read(first: Skipped, shards: int) -> UserError:
    """Return the error to raise if none of the shards can be read. `first`: the error of the first shard."""
    others = f"; the same applies to {counted(shards - 1, 'other')}" if shards > 1 else ""
    return UserError(f"shard {first}{others}")


def _held(path: Path) -> str | None:
    """Return the digest of a manifest; None if the manifest is missing or damaged, or if some of its shards could not
    be read."""
    try:
        rows = read(path)
    except UserError:
        return None
    return None if (rows["kind"] == UNREAD).any() else hashlib.sha256(rows.tobytes()).hexdigest()
