"""The contents of shards as a table, and as a manifest for runs with many shards; see `data.manifest`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import rich.table
from rich.console import Console
from rich.markup import escape

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import parse_json
from m3ae_fast.base.wording import counted
from m3ae_fast.config.arguments import accepts
from m3ae_fast.data.corpus import describe_ignored
from m3ae_fast.data.download import read_small
from m3ae_fast.data.index import IndexedShard, index_shards
from m3ae_fast.data.manifest import KINDS, UNREAD, none_read, rows_of, rows_of_indexed, write
from m3ae_fast.data.shard_names import expand
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.shards.options import TableOptions

_THREADS = 32
_MAX_BYTES = 1 << 26  # maximum number of bytes of a file with sample counts


class ShardTable(NamedTuple):
    """The contents of shards."""

    rows: np.ndarray  # the rows of a manifest, structured [shards]; see `data.manifest`
    indexed: list[IndexedShard]  # shards that have been read
    notes: list[str]  # notes about unreadable and incomplete shards

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return int(self.rows["samples"].sum(dtype=np.int64))

    @property
    def unread(self) -> int:
        """Return the number of shards that cannot be read."""
        return int((self.rows["kind"] == UNREAD).sum())


@accepts(TableOptions)
def table(shards: str | Sequence[str], out: str | os.PathLike[str] | None = None, **options: Any) -> ShardTable:
    """Write the missing indexes of shards, and return the contents of all shards.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        out: a .npy file, the manifest to write, which can be used as `shards` of a source in the config; None: no
            manifest.
        options: the other options of the command: the fields of `options.TableOptions`.

    Raises:
        UserError: a shard does not exist, no shard can be read, or `out` cannot be written.
    """
    given = TableOptions(shards=shards, out=out, **options)
    names, store = expand(given.shards), ShardStore(given.cache_dir)
    if given.stats:
        found = ShardTable(_counted(names, store), [], [])
    else:
        lost: list[Skipped] = []
        indexed = index_shards(names, store, True, lost)
        if not indexed:
            raise none_read(lost[0], len(lost))
        rows, notes = rows_of_indexed(names, indexed, lost)
        found = ShardTable(rows, indexed, list(map(str, notes)))
    if given.out is not None:
        write(given.out, found.rows)
    return found


def print_table(shards: Sequence[IndexedShard]) -> None:
    """Print the contents of each shard."""
    table = rich.table.Table("shard", "modality")
    for name in ("samples", "paired", "image-only", "text-only", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("not read")
    table.add_column("damage")
    totals = [0] * 5
    for shard in shards:
        found = shard.summary
        alone = found.images - found.paired, found.captions - found.paired
        counts = [found.samples, found.paired, *alone, found.size]
        totals = [total + count for total, count in zip(totals, counts)]
        notes = escape(describe_ignored([shard])), escape(found.damage or "")
        modality = found.modality if found.samples else "-"
        table.add_row(escape(shard.shard), modality, *(f"{n:,}" for n in counts), *notes)
    table.add_section()
    table.add_row(
        counted(len(shards), "shard"),
        "",
        *(f"{n:,}" for n in totals),
        describe_ignored(shards),
        "",
    )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _counted(names: Sequence[str], store: ShardStore) -> np.ndarray:
    """Return the rows of a manifest for shards whose numbers of samples are known. Only the first shard that is not
    empty is read, and all shards are assumed to have its modality."""
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(track(pool.map(_stats, names), "reading counts", len(names)))
    some = [name for name, found in zip(names, samples) if found][:1]
    kind = KINDS.index(index_shards(some, store)[0].summary.modality) if some else 0
    return rows_of(names, [(found, 0, kind) for found in samples])


def _stats(shard: str) -> int:
    """Return the number of samples in a shard according to img2dataset's statistics."""
    before, _, after = shard.rpartition(".tar")
    name = f"{before}_stats.json{after}"
    return _whole(_json(name).get("successes"), f"{name}: successes")


def _json(name: str) -> dict[str, Any]:
    try:
        content = parse_json(read_small(name, _MAX_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: is not a JSON object")
    return content


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise UserError(f"{what}: must be a number of samples, but is {value!r}")
    return value
