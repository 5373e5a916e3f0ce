"""Makes manifests: counts what shards hold, in as many processes as there are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from m3ae_fast.batch.bad_samples import Skipped
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.manifest import KINDS, SUFFIX, UNREAD, is_manifest, join, read, rows_of, write
from m3ae_fast.data.order import permutation
from m3ae_fast.data.shards import ShardStore, expand
from m3ae_fast.errors import UserError, attempt

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]  # every process's value, on every process


class Process(Protocol):
    """Which of all processes this is, as `process.ranks.Ranks` says it."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def local_rank(self) -> int: ...


def count(names: Sequence[str], store: ShardStore, progress: bool = False) -> tuple[np.ndarray, list[Skipped]]:
    """Return a manifest of shards, which are read whole, and those lost. Raises UserError as `index_shards`."""
    lost: list[Skipped] = []
    found = {entry.shard: entry.summary for entry in index_shards(names, store, progress, lost)}
    unread = (0, 0, UNREAD)
    summaries = [found.get(name) for name in names]
    counts = [(s.samples, s.size, KINDS.index(s.modality)) if s else unread for s in summaries]
    return rows_of(names, counts), lost


def part_of(names: Sequence[T], number: int, parts: int) -> Sequence[T]:
    """Return the `number`-th, from 0, of equal parts."""
    return names[number * len(names) // parts : (number + 1) * len(names) // parts]


def cached(names: Sequence[str], store: ShardStore) -> Path:
    """Return where the manifest that a run makes of these shards lies."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return store.cache_dir / "manifests" / (digest + SUFFIX)


def prepare(
    patterns: str | list[str],
    store: ShardStore,
    process: Process,
    gather: Gather,
    progress: bool = False,
    key: tuple[int, int] = (0, 0),
) -> None:
    """Count shards that are not read in place, each process its part, and leave the manifest on every node. Nothing is
    done where the same is on all already or `patterns` names one. Every process must call it.

    `key`: the seed and the number of the source. Parts are cut as lanes will be: what a node fetches to count it, it is
    to train on, and where there is room it does not fetch it again.

    Raises:
        UserError: in every process where one of them cannot write, or no shard can be read.
    """
    names = [] if is_manifest(patterns) else expand(patterns)
    path = cached(names, store)
    if not any(map(store.is_cached, names)):
        return
    held = gather(_held(path))  # nodes may have counted at different times, or in different runs
    if held[0] is not None and len(set(held)) == 1:
        return

    order = permutation(len(names), *key)

    def part() -> tuple[np.ndarray, list[Skipped]]:
        own = [names[number] for number in part_of(order.tolist(), process.rank, process.world)]
        rows, lost = count(own, store, progress)
        return rows, lost[:1]

    found = _all(gather, part)
    rows = join([rows for rows, _ in found])[np.argsort(order)]
    if (rows["kind"] == UNREAD).all():
        raise none_read(next(first for _, lost in found for first in lost), len(rows))
    _all(gather, lambda: write(path, rows) if process.local_rank == 0 else None)


def none_read(first: Skipped, shards: int) -> UserError:
    """Return the error to raise where none of so many shards can be read."""
    others = f"; nor can {shards - 1:,} other{'s' * (shards > 2)}" if shards > 1 else ""
    return UserError(f"shard {first}{others}")


def _held(path: Path) -> str | None:
    """Return the digest of a manifest; None where there is none, it is damaged, or shards of it could not be read."""
    try:
        rows = read(path)
    except UserError:
        return None
    return None if (rows["kind"] == UNREAD).any() else hashlib.sha256(rows.tobytes()).hexdigest()


def _all(gather: Gather, work: Callable[[], Any]) -> list[Any]:
    """Return what `work` gives in each process. A UserError or OSError of one is raised in all, as a UserError."""
    found = gather(attempt(work))
    if failed := next((error for _, error in found if error), None):
        raise UserError(failed)
    return [value for value, _ in found]
