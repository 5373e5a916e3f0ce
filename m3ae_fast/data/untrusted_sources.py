"""Prevents untrusted files from executing programs or choosing where files are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data.shard_names import expand, is_remote
from m3ae_fast.data.shard_store import ShardStore

# URLs that match this pattern are harmless: they are downloaded by this process, or by a command that receives the URL
# as a single argument.
_FETCHED = re.compile(r"(https?|s3|gs)://")


def require_harmless(sources: Iterable[SourceConfig], cache_dir: Path | None, where: str) -> None:
    """Raise UserError if a shard of `sources` would run a program, or if `cache_dir` is not yet a cache folder, because
    files are written to this folder and removed from it. `where`: the file that contains these settings."""
    advice = "add --trust if you trust it, or specify other shards with --val"
    for shard in (shard for source in sources for shard in expand(source.shards)):
        if is_remote(shard) and not _FETCHED.match(shard):
            raise UserError(f"{where}: contains the shards {shard!r}, which run a program; {advice}")
    if cache_dir is not None and not ShardStore.is_cache(cache_dir):
        raise UserError(f"{where}: sets data.cache_dir to {cache_dir}, which is not yet a cache folder; {advice}")
