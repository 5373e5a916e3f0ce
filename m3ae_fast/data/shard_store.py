"""The shard cache: local files for shards.

An uncompressed tar on a local disk is read in place. All other shards (URLs, `pipe:` commands, gzipped tars, files on a
network file system) are copied to the cache folder once per node: the copy is written to a temporary file, which is
then renamed. Each shard has a lock for all processes of the node. Several users may share the folder if its mode and
their umask allow it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import struct
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from m3ae_fast.base.atomic_file import is_abandoned, lock, sync_to_disk
from m3ae_fast.base.errors import UserError
from m3ae_fast.data.download import ATTEMPTS, NotFound, download, retry_after
from m3ae_fast.data.shard_names import is_remote

FREE_FRACTION = 0.1  # fraction of the cache folder's disk that is kept free; older copies are evicted to achieve this
_KEPT_NS = 1000  # nanoseconds between the modification times that `keep` sets for consecutive shards
_EVICTION = "room"  # name of the lock for eviction
_LEDGER = struct.Struct("<QQ")  # see `ShardStore._evict`
_SCAN_S = 60.0  # seconds between scans of all copies while the cache is full
_SCANS = 4  # maximum number of scans of all copies to make space for one new copy
_PARTIAL = "partial-"  # prefix of the names of incomplete copies
_FOLDERS = ("shards", "locks", "index")  # sub-folders of a cache folder
# _NETWORK: prefixes of the types of network file systems. _LOCAL: types that have such a prefix, but store their files
# on local disks.
_NETWORK = ("nfs", "lustre", "gpfs", "ceph", "cifs", "smb", "beegfs", "wekafs", "afs", "panfs", "fuse.")
_LOCAL = ("fuse.fuse-overlayfs", "fuse.mergerfs")


def network_file_system(path: Path) -> str:
    """Return the type of `path`'s file system, such as "nfs4", if it is a network file system; otherwise ""."""
    own = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (own, *own.parents) if parent in mounts), "")
    return kind if kind.startswith(_NETWORK) and kind not in _LOCAL else ""


class CacheSpace(NamedTuple):
    """Limit and usage of the cache folder, in bytes."""

    limit: float  # maximum size of all copies
    used: int  # size of all copies, including incomplete ones
    largest: int  # size of the largest copy


class ShardStore:
    """Cache that provides local files for shards. `cache_dir` contains copies and locks; None:
    `$XDG_CACHE_HOME/m3ae_fast` or `~/.cache/m3ae_fast`. Copies take at most `cache_gb` GB; None: they may fill the disk
    until only FREE_FRACTION of it is free. Raises UserError if the folder cannot be created."""

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, cache_gb: float | None = None):
        self._far: dict[str, bool] = {}  # whether a folder is on a network file system, by folder
        self._oldest: deque[_Copy] | None = None  # copies found in the last scan, oldest first
        self._looked = 0.0  # time of the last scan
        self.limit = math.inf if cache_gb is None else round(cache_gb * 1e9)  # bytes
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.cache_dir = Path(cache_dir or Path(home) / "m3ae_fast").expanduser()
        try:
            for name in _FOLDERS:
                (self.cache_dir / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {self.cache_dir}: cannot be created ({error.strerror}); choose a writable folder"
            ) from None
        # whether shards on a network file system are copied to the cache
        self.staging = not network_file_system(self.cache_dir)

    @staticmethod
    def is_cache(folder: Path) -> bool:
        """Return whether the folder is already a cache folder."""
        return all((folder.expanduser() / name).is_dir() for name in _FOLDERS)

    @staticmethod
    def must_be_copied(shard: str) -> bool:
        """Return whether the shard must be copied to the cache folder before it can be read."""
        return is_remote(shard) or shard.endswith((".gz", ".tgz"))

    def is_staged(self, shard: str) -> bool:
        """Return whether samples are read from a cached copy. This includes shards on a network file system, which
        would otherwise be read a few KB at a time."""
        if self.must_be_copied(shard):
            return True
        folder = os.path.dirname(os.path.abspath(shard))
        if self.staging and folder not in self._far:
            self._far[folder] = bool(network_file_system(Path(folder)))
        return self.staging and self._far[folder]

    def in_place(self) -> ShardStore:
        """Return a store that reads shards on a network file system in place, for callers that read only a few
        samples."""
        other = shallow_copy(self)
        other.staging = False
        return other

    def name(self, shard: str) -> str:
        """Return a unique file name for data about the shard. For a local shard, the name also depends on the shard's
        size and modification time. Raises OSError if a local shard does not exist."""
        identity = shard
        if not is_remote(shard):
            status = os.stat(shard)
            identity = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
        tail = "".join(c if c.isalnum() or c in "-_." else "_" for c in shard)[-40:]
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{tail}"

    def copy(self, shard: str) -> Path:
        """Return the path of the cached copy of a shard that is not read in place, whether or not it exists."""
        return self.cache_dir / "shards" / self.name(shard)

    def path(self, shard: str, size: int = 0) -> Path:
        """Return the path of the shard's tar, after downloading it if necessary. Raises OSError if that fails. `size`:
        bytes of the tar; 0: unknown."""
        if not self.is_staged(shard):
            return Path(shard)
        copy = self.copy(shard)
        while True:
            try:
                with contextlib.suppress(PermissionError):  # the copy belongs to another user
                    os.utime(copy)  # the copy has just been used, so it is evicted last
                    return copy
                if copy.is_file():
                    return copy
            except FileNotFoundError:
                with self.lock(copy.name):  # per shard, so that processes that need other shards do not wait
                    if not copy.exists():
                        self._fetch(shard, copy, size)

    def refetch(self, shard: str) -> Path:
        """Replace a damaged copy and return the path of the new one. Raises OSError if that fails, or if the shard is
        read in place."""
        copy = self.copy(shard)
        if not self.is_staged(shard):
            raise OSError(f"the shard {shard} is damaged")
        with self.lock(copy.name):
            self._fetch(shard, copy)
        return copy

    def fetch_ahead(self, shard: str, size: int = 0) -> bool:
        """Download a shard unless it is cached or another process is downloading it. Return False if that fails; the
        reader of the shard reports the error."""
        try:
            copy = self.copy(shard)
            with self.lock(copy.name, wait=False):
                if not copy.exists():
                    self._fetch(shard, copy, size)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def keep(self, shards: Sequence[str]) -> None:
        """Set the modification times of cached shards so that eviction first removes the shards that are not listed,
        then the listed shards from the last to the first. `shards`: names of shards, in the order in which they will be
        needed."""
        now = time.time_ns()
        if self._oldest:
            self._oldest.clear()  # the scan is outdated, because the modification times change below
        for number, shard in enumerate(shards):
            when = now - number * _KEPT_NS
            with contextlib.suppress(OSError):  # the copy does not exist, or belongs to another user
                os.utime(self.copy(shard), ns=(when, when))

    def space(self) -> CacheSpace:
        """Return the limit and the current usage of the cache."""
        sizes = [copy.size for copy in self._copies()]
        usage = shutil.disk_usage(self.cache_dir)
        most = min(self.limit, sum(sizes) + usage.free - FREE_FRACTION * usage.total)
        return CacheSpace(most, sum(sizes), max(sizes, default=0))

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[int]:
        """Hold a lock on this node and yield its file handle. Raises BlockingIOError if another process holds it and
        `wait` is False."""
        path = self.cache_dir / "locks" / name
        try:  # filelock is not used, because it polls and cannot lock another user's file
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:  # the file belongs to another user
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield fd
        finally:
            os.close(fd)

    def _fetch(self, shard: str, copy: Path, size: int = 0) -> None:
        """Download a shard and replace the old copy, if any. Processes that have the old copy open can still read
        it."""
        for attempt in range(ATTEMPTS):
            partial = self.cache_dir / "shards" / f"{_PARTIAL}{uuid.uuid4().hex}"
            gone = 0  # number of bytes that the ledger counts for the unfinished file
            try:
                out, gone = self._begin(partial, size)
                with out:
                    download(shard, out)
                    with self.lock(_EVICTION) as ledger:  # the copy may be larger than expected
                        out.truncate(out.tell())
                        self._evict(ledger, grown=out.tell() - gone)
                    gone = out.tell()
                    sync_to_disk(partial)
                    with self.lock(_EVICTION) as ledger:  # no other process may evict the old copy meanwhile
                        replaced = copy.stat().st_size if copy.exists() else 0
                        os.replace(partial, copy)
                        gone = 0
                        if replaced:
                            self._evict(ledger, grown=-replaced)
                    sync_to_disk(copy.parent)
                return
            except OSError as error:
                if isinstance(error, NotFound) or attempt == ATTEMPTS - 1 or not is_remote(shard):
                    raise OSError(f"cannot fetch {shard}: {error}") from error
                time.sleep(retry_after(error, attempt))
            finally:
                if gone:
                    with self.lock(_EVICTION) as ledger:
                        # the file is closed and therefore counts as abandoned, so a scan by another process may have
                        # removed it
                        grown = -gone if partial.exists() else 0
                        partial.unlink(missing_ok=True)
                        self._evict(ledger, grown=grown)
                partial.unlink(missing_ok=True)

    def _begin(self, partial: Path, size: int) -> tuple[BinaryIO, int]:
        """Create an empty file and reserve `size` bytes for it in the ledger; if `size` is 0, reserve the size of the
        largest copy. Return the file and the number of reserved bytes. The file is locked until it is closed; an
        unlocked incomplete file belongs to a killed process. The umask determines who may read the new file."""
        with self.lock(_EVICTION) as ledger:
            size = self._evict(ledger, size)
            out = open(partial, "x+b")  # noqa: SIM115
            lock(out.fileno())
            out.truncate(size)  # the file is sparse and takes no space on disk yet
        return out, size

    def _evict(self, ledger: int, size: int | None = None, grown: int = 0) -> int:
        """Evict the oldest copies until there is room for a new copy within the limit and FREE_FRACTION of the disk is
        free. Processes that have an evicted copy open can still read it (POSIX).

        Scanning all copies takes time in proportion to their number, while all other processes wait. The scan is
        skipped if the ledger shows that there is enough space, or if this process has scanned recently. In the latter
        case, the oldest copies found by that scan are evicted unless they have been used since. If this does not free
        enough space because other processes or threads have used these copies, all copies are scanned again.

        Args:
            ledger: handle of the lock file, which contains the bytes of all copies and of the largest copy.
            size: bytes of a new copy; 0: the bytes of the largest copy; None: there is no new copy.
            grown: bytes by which the copies have grown since the last entry in the ledger.

        Returns:
            The bytes of the new copy.
        """
        noted = os.pread(ledger, _LEDGER.size, 0)
        scans = int(self._oldest is None or len(noted) < _LEDGER.size)
        used, largest = self._look() if scans else _LEDGER.unpack(noted)
        used += 0 if scans else grown
        while not self._has_space(used + (new := 0 if size is None else size or largest)):
            stale = scans == 0 and time.monotonic() - self._looked > _SCAN_S
            if self._oldest and not stale:
                used -= self._remove(self._oldest.popleft())
                continue
            if scans == _SCANS:
                break
            (used, largest), scans = self._look(), scans + 1
            if not self._oldest:
                break
        self._note(ledger, used + new, max(largest, new))
        return new

    @staticmethod
    def _remove(copy: _Copy) -> int:
        """Remove a copy unless it has been used since the scan. Return the freed bytes."""
        # errors are ignored if another process has removed the copy, or if the copy belongs to another user
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if copy.path.stat().st_mtime_ns == copy.used:
                copy.path.unlink()
                return copy.size
        return 0

    def _has_space(self, used: int) -> bool:
        usage = shutil.disk_usage(self.cache_dir)
        return used <= self.limit and usage.free >= FREE_FRACTION * usage.total

    @staticmethod
    def _note(ledger: int, used: int, largest: int) -> None:
        # Writing fails if the file belongs to another user. Each process scans all copies before it first relies on the
        # ledger.
        with contextlib.suppress(OSError):
            os.pwrite(ledger, _LEDGER.pack(max(used, 0), largest), 0)

    def _look(self) -> tuple[int, int]:
        """Scan all copies and remove incomplete ones of killed processes. Return the bytes of all copies and of the
        largest copy."""
        copies = sorted(self._copies())
        for copy in [each for each in copies if each.path.name.startswith(_PARTIAL) and is_abandoned(each.path)]:
            with contextlib.suppress(PermissionError):  # the copy belongs to another user
                copy.path.unlink(missing_ok=True)
                copies.remove(copy)
        self._looked = time.monotonic()
        self._oldest = deque(copy for copy in copies if not copy.path.name.startswith(_PARTIAL))
        sizes = [copy.size for copy in copies]
        return sum(sizes), max(sizes, default=0)

    def _copies(self) -> list[_Copy]:
        found = []
        for entry in os.scandir(self.cache_dir / "shards"):
            with contextlib.suppress(FileNotFoundError):  # another process is evicting too
                status = entry.stat()
                found.append(_Copy(status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found


class _Copy(NamedTuple):
    """A complete or incomplete copy in the cache folder."""

    used: int  # time of last use in ns, or the time set by `ShardStore.keep`
    size: int
    path: Path
