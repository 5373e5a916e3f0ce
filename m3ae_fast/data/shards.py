"""Shard names as users write them, and where their bytes lie on this machine.

A plain local tar is read in place. Everything else (URLs, `pipe:` commands, gzipped tars) is copied into the cache
folder once a node: into a temporary file, then renamed, under a lock that all processes of the node respect.
"""

from __future__ import annotations

import fcntl
import glob
import gzip
import hashlib
import math
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from m3ae_fast.errors import UserError

FREE_SHARE = 0.1  # of the cache folder's disk stays free: older copies make room
ATTEMPTS = 3
TIMEOUT_S = 60
ABANDONED_S = 86_400  # a partial copy this old was left by a process that was killed
MAX_SHARDS = 10_000_000
INDEX_SUFFIX = ".index"  # of the sidecar that an indexed shard has
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)")
_GZIP_MAGIC = b"\x1f\x8b"


def expand(patterns: str | list[str]) -> list[str]:
    """Write out brace patterns (`{0000..0041}`), `::` lists and, for local paths, globs.

    Raises:
        UserError: a pattern is malformed, matches nothing, or names a local shard that is not there.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if math.prod(abs(int(b) - int(a)) + 1 for a, b in _RANGE.findall(pattern)) > MAX_SHARDS:
            raise UserError(f"shards {pattern!r}: is more than {MAX_SHARDS:,} names")
        try:
            names = expand_urls(pattern)
        except (ValueError, AssertionError) as error:  # unbalanced braces, a missing WDS_ variable
            raise UserError(f"shards {pattern!r}: not a valid pattern ({error})") from None
        for name in names:
            shards += [name] if is_remote(name) else _local(name)
    if not shards:
        raise UserError(f"shards {patterns!r}: matches nothing")
    return shards


def is_remote(shard: str) -> bool:
    return shard.startswith("pipe:") or ("://" in shard and not shard.startswith("file:"))


def _local(name: str) -> list[str]:
    name = os.path.expanduser(name.removeprefix("file://").removeprefix("file:"))
    found = [name]
    if glob.has_magic(name) and not os.path.exists(name):
        found = sorted(path for path in glob.glob(name) if not path.endswith(INDEX_SUFFIX))
    if not found:
        raise UserError(f"shards {name!r}: matches no file")
    for path in found:
        if os.path.isdir(path):
            raise UserError(f"shards {path!r}: is a folder; name its tars, as in {os.path.join(path, '*.tar')!r}")
        if not os.path.exists(path):
            raise UserError(f"shards {path!r}: no such file")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"shards {path!r}: the name is not UTF-8; rename the file") from None
    return found


class ShardStore:
    """Local files for shards.

    Args:
        cache_dir: where copies and locks are kept; None: `$XDG_CACHE_HOME/m3ae_fast` or `~/.cache/m3ae_fast`.

    Raises:
        UserError: the cache folder cannot be made.
    """

    def __init__(self, cache_dir: Path | None = None):
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.cache_dir = Path(cache_dir or Path(home) / "m3ae_fast").expanduser()
        try:
            for name in ("shards", "locks", "index"):
                (self.cache_dir / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {self.cache_dir}: {error.strerror}; name a folder to write to") from None

    @staticmethod
    def is_cached(shard: str) -> bool:
        """Whether the shard is read from a copy in the cache folder, not in place."""
        return is_remote(shard) or shard.endswith((".gz", ".tgz"))

    def name(self, shard: str) -> str:
        """A file name for things about the shard: unique, and of the contents too where it is a local file."""
        identity = shard
        if not is_remote(shard):
            status = os.stat(shard)
            identity = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
        tail = "".join(c if c.isalnum() or c in "-_." else "_" for c in shard)[-40:]
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{tail}"

    def path(self, shard: str) -> Path:
        """The file that holds the shard's tar, fetched first if need be. Raises OSError where that fails."""
        if not self.is_cached(shard):
            return Path(shard)
        copy = self.cache_dir / "shards" / self.name(shard)
        while True:
            try:
                os.utime(copy)  # used now: the last to make room for others
                return copy
            except FileNotFoundError:
                with self.lock(copy.name):
                    if not copy.exists():
                        self._fetch(shard, copy)

    def fetch_ahead(self, shards: list[str]) -> None:
        """Fetch those of `shards` that no other process is fetching. A failure is left to whoever reads the shard."""
        for shard in filter(self.is_cached, shards):
            try:
                copy = self.cache_dir / "shards" / self.name(shard)
                with self.lock(copy.name, wait=False):
                    if not copy.exists():
                        self._fetch(shard, copy)
            except OSError:
                continue

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Hold a lock of this node. Raises BlockingIOError where another process has it and `wait` is false."""
        with open(self.cache_dir / "locks" / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def _fetch(self, shard: str, copy: Path) -> None:
        for attempt in range(ATTEMPTS):
            handle, partial = tempfile.mkstemp(prefix="partial-", dir=copy.parent)
            try:
                with os.fdopen(handle, "wb") as out:
                    self._make_room()
                    _copy(shard, out)
                os.replace(partial, copy)
                return
            except Exception as error:  # handlers of all schemes, decompression included, raise what they like
                gone = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if gone or attempt == ATTEMPTS - 1 or not is_remote(shard):
                    raise OSError(f"cannot fetch {shard}: {error}") from error
                time.sleep(2.0**attempt)
            finally:
                Path(partial).unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the copies used longest ago until FREE_SHARE of the disk is free. Open ones stay readable (POSIX)."""
        for path in sorted((self.cache_dir / "shards").iterdir(), key=_mtime):
            if path.name.startswith("partial-") and time.time() - _mtime(path) < ABANDONED_S:
                continue
            usage = shutil.disk_usage(self.cache_dir)
            if usage.free >= FREE_SHARE * usage.total:
                return
            path.unlink(missing_ok=True)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process makes room too
        return 0.0


def _copy(shard: str, out: BinaryIO) -> None:
    with _open(shard) as source:
        head = _read_up_to(source, len(_GZIP_MAGIC))
        joined = _Joined(head, source)
        plain = gzip.GzipFile(fileobj=cast(BinaryIO, joined)) if head == _GZIP_MAGIC else joined
        shutil.copyfileobj(cast(BinaryIO, plain), out, 1 << 20)
        if joined.expected is not None and joined.total != joined.expected:
            raise OSError(f"got {joined.total} of {joined.expected} bytes")
    if not out.tell():
        raise OSError("got no bytes")


def _open(shard: str):
    if shard.startswith(("http://", "https://")):
        return urllib.request.urlopen(shard, timeout=TIMEOUT_S)  # gopen would need curl installed
    if not is_remote(shard):
        return open(shard, "rb")
    if shard.startswith("s3://"):
        shard = f"pipe:aws s3 cp {shlex.quote(shard)} -"
    return gopen(shard)


def _read_up_to(source, size: int) -> bytes:
    head = b""
    while len(head) < size and (more := source.read(size - len(head))):
        head += more
    return head


class _Joined:
    """A stream with its first bytes put back, that counts what was read."""

    def __init__(self, head: bytes, rest):
        self.head, self.rest, self.total = head, rest, 0
        length = rest.headers.get("Content-Length") if hasattr(rest, "headers") else None
        self.expected = int(length) if length else None

    def read(self, size: int = -1) -> bytes:
        data, self.head = (self.head, b"") if self.head else (self.rest.read(size), b"")
        if len(data) > size >= 0:
            data, self.head = data[:size], data[size:]
        self.total += len(data)
        return data
