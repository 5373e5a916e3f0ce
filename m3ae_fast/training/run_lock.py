"""Exclusive ownership of a run folder, by means of locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import BinaryIO

from m3ae_fast.base.errors import UserError

LOCK_FILE = ".lock"
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_OWN: set[tuple[int, int, int]] = set()  # process, device and inode of the lock files that this process has locked


def is_held(path: Path) -> bool:
    """Return whether another process holds the lock of the run folder. The lock is not taken, because that might
    prevent a run from starting."""
    try:
        if _identity(os.stat(path / LOCK_FILE)) in _OWN:  # closing the file would release the lock of this process
            return False
        with (path / LOCK_FILE).open("rb") as file:
            request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, request))
    except OSError:
        return False
    return kind != fcntl.F_UNLCK


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), found.st_dev, found.st_ino


class RunFolder:
    """A run folder that is locked for this process. Use as a context manager.

    Two locks are used: a POSIX lock on a file, which all file systems support, and flock on the folder itself, which
    remains effective if the file is removed. Both are released when this process ends, even if it is killed: loader
    workers do not inherit the POSIX lock, and close their handle of the folder. The filelock library is not used,
    because it applies flock to a file: if this file is removed, two processes can hold the lock. Moreover, loader
    workers inherit the lock in versions of this library before 4, and a killed run leaves a lock file behind on file
    systems without flock.

    On a network file system, the POSIX lock is valid on all nodes, unless the mount options restrict it to one node
    (`nolock` or `local_lock` of NFS, `localflock` of Lustre).
    """

    def __init__(self, path: Path) -> None:
        """Lock the folder. Raises UserError if `path` cannot be written to, or if another run holds the lock."""
        self.path = path
        self._made = [each for each in (path, *path.parents) if not each.exists()]
        self._before = {*os.listdir(path)} if path.is_dir() else set()
        self._lock: BinaryIO | None = None
        self._folder_lock: int | None = None
        os.register_at_fork(after_in_child=self._unlock_folder)
        self._take()

    def keep(self) -> str:
        """Renew the lock if its file or the folder was removed, or the folder was renamed. Return a description of what
        happened; "" if nothing happened. Raises UserError if another run has locked the folder in the meantime."""
        assert self._lock is not None
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK_FILE)):
                return ""
        except OSError:
            pass
        event = self._lock_event()
        self._unlock()
        self._take()
        return event

    def _lock_event(self) -> str:
        assert self._folder_lock is not None
        held, now = os.fstat(self._folder_lock), Path(os.readlink(f"/proc/self/fd/{self._folder_lock}"))
        if self.path.exists() and os.path.samestat(held, os.stat(self.path)):
            return f"run.dir {self.path}: its {LOCK_FILE} was deleted and has been re-created"
        if not held.st_nlink or not now.exists():
            return f"run.dir {self.path} and its contents were deleted during the run; the folder has been re-created"
        return (
            f"run.dir {self.path} was renamed to {now}: metrics are still written there, but checkpoints are written "
            f"to a new {self.path}; to reunite them, stop the run, move {self.path}/checkpoints/* to "
            f"{now}/checkpoints, and resume with run.dir={now}"
        )

    def _take(self) -> None:
        """Create the folder if necessary, and lock it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._folder_lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
            self._lock = (self.path / LOCK_FILE).open("wb")
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _OWN.add(_identity(os.fstat(self._lock.fileno())))
        except BlockingIOError:
            self._unlock()
            raise UserError(f"{self.path}: another run is using this folder; choose another one") from None
        except OSError as error:
            self._unlock()
            raise UserError(f"{self.path}: cannot be written to ({error.strerror or error})") from None

    def _unlock(self) -> None:
        if self._lock is not None and not self._lock.closed:
            _OWN.discard(_identity(os.fstat(self._lock.fileno())))
            self._lock.close()
        self._unlock_folder()

    def _unlock_folder(self) -> None:
        if self._folder_lock is not None:
            os.close(self._folder_lock)
        self._folder_lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the locks. If nothing was written to the folder, the lock file and the folders that this object
        created are removed."""
        # If the folder was removed in the meantime, only the error that ends the run is reported.
        with contextlib.suppress(OSError):
            if {*os.listdir(self.path)} - self._before == {LOCK_FILE}:
                (self.path / LOCK_FILE).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._unlock()
