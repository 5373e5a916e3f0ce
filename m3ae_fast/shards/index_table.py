"""Creation of the indexes of shards, and a table of their contents."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m3ae_fast.data.corpus import describe_ignored
from m3ae_fast.data.index import IndexedShard, index_shards
from m3ae_fast.data.shard_store import ShardStore, expand


def index(shards: str | Sequence[str], *, cache_dir: str | os.PathLike[str] | None = None) -> list[IndexedShard]:
    """Write the missing indexes of shards, and return the index entries of all shards.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        cache_dir: cache folder for copies of remote shards; None: ~/.cache/m3ae_fast.

    Raises:
        UserError: a shard does not exist, or no shard can be read.
    """
    return index_shards(expand(shards), ShardStore(cache_dir), progress=True)


def print_index(shards: Sequence[IndexedShard]) -> None:
    """Print a table of the contents of each shard."""
    table = Table("shard", "modality")
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
        f"{len(shards):,} shard{'s' * (len(shards) != 1)}",
        "",
        *(f"{n:,}" for n in totals),
        describe_ignored(shards),
        "",
    )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
