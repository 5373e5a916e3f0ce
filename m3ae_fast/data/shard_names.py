"""Names of shards: expansion of patterns, and whether a shard is remote."""

from __future__ import annotations

import glob
import math
import os
import re
import stat
from collections.abc import Sequence

from webdataset.shardlists import expand_urls

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.s3_and_gs import require

MAX_SHARDS = 10_000_000
INDEX_SUFFIX = ".index"  # suffix of a shard's sidecar
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)")


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return the names of the shards in `patterns`, after expanding brace patterns (`{0000..0041}`), `::` lists and,
    for local paths, globs. The name of an existing file or folder is not a pattern, even if it contains such
    characters. Raises UserError if a pattern is malformed or matches nothing, a shard does not exist, or a library that
    is needed to read it is not installed."""
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if math.prod(abs(int(b) - int(a)) + 1 for a, b in _RANGE.findall(pattern)) > MAX_SHARDS:
            raise UserError(f"shards {pattern!r}: expands to more than {MAX_SHARDS:,} names")
        try:
            names = [pattern] if _is_literal(pattern) else expand_urls(pattern)
        except (ValueError, AssertionError) as error:  # raised for unbalanced braces or a missing WDS_ variable
            raise UserError(f"shards {pattern!r}: not a valid pattern ({error})") from None
        for name in names:
            require(name)
            shards += [name] if is_remote(name) else _local(name)
    if not shards:
        raise UserError(f"shards {patterns!r}: matches no shards")
    return shards


def _is_literal(pattern: str) -> bool:
    """Return whether braces and colons in a pattern are part of the name of an existing file, or of a folder. For
    speed, the disk is not accessed if the pattern contains no braces and no colons."""
    if is_remote(pattern) or not ("{" in pattern or "::" in pattern):
        return False
    path = _local_path(pattern)
    folder, name = os.path.split(path)
    return os.path.exists(path) or (os.path.isdir(folder) and not ("{" in name or "::" in name))


def _local_path(name: str) -> str:
    return os.path.expanduser(name.removeprefix("file://").removeprefix("file:"))


def is_remote(shard: str) -> bool:
    """Return whether the shard is a URL (other than file:) or a `pipe:` command."""
    return shard.startswith("pipe:") or ("://" in shard and not shard.startswith("file:"))


CLIP_ART = "data/openclipart/"  # the shards of the config quickstart, which are in a clone but not in an installation


def _advice_on(folder: str) -> str:
    """Return advice for a user who specified a folder instead of shards."""
    if glob.glob(os.path.join(glob.escape(folder), "*.tar")):
        return f"specify its tars, as in {os.path.join(folder, '*.tar')!r}"
    return f"make shards of its images: m3ae-fast shards make {folder} --out SHARDS"


def _local(name: str) -> list[str]:
    name = _local_path(name)
    found = [name]
    if glob.has_magic(name) and not os.path.exists(name):
        folder, last = os.path.split(name)
        pattern = os.path.join(glob.escape(folder), last) if os.path.isdir(folder) else name
        found = sorted(path for path in glob.glob(pattern) if not path.endswith(INDEX_SUFFIX))
    if not found:
        raise UserError(f"shards {name!r}: matches no files")
    for path in found:
        if os.path.isdir(path):
            raise UserError(f"shards {path!r}: is a folder; {_advice_on(path)}")
        if not os.path.exists(path):
            inside = "; it is part of a clone of m3ae-fast: run the command there, or specify your own shards"
            raise UserError(f"shards {path!r}: no such file{inside if path.startswith(CLIP_ART) else ''}")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"shards {path!r}: is a pipe or a device; specify a file, or 'pipe:cat {path}'")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"shards {path!r}: the name is not UTF-8; rename the file") from None
    return found
