"""A run folder has one owner: whoever holds its lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

from m3ae_fast.base.errors import UserError

LOCK_FILE = ".lock"
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


def is_held(path: Path) -> bool:
    """Return whether another process holds the run folder. Takes no lock, which might keep a run from starting."""
    try:
        with (path / LOCK_FILE).open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return False
    return kind != fcntl.F_UNLCK


class RunFolder:
    """Holds the folder from its making until `close`; use as a context manager.

    Two locks: POSIX's on a file, which all file systems know, and flock's on the folder itself, which outlives that
    file where it is known. Both end with this process, however that ends: the first does not pass to loader workers,
    and they drop the second. (filelock's, flock's on a file, has two holders once that file is removed, passes to
    workers before version 4, and where flock is missing leaves a mark that outlives a killed run.)
    """

    def __init__(self, path: Path) -> None:
        """Lock the folder. Raises UserError if `path` cannot be written to, or another run holds it."""
        self.path, self._made = path, not path.exists()
        self._lock: BinaryIO | None = None
        self._folder_lock: int | None = None
        os.register_at_fork(after_in_child=self._unlock_folder)
        self._take()

    def keep(self) -> str:
        """Take the lock again if its file or the folder was removed, or the folder renamed. Return what happened; "" if
        nothing did. Raises UserError if another run was faster."""
        assert self._lock is not None
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK_FILE)):
                return ""
        except OSError:
            pass
        event = self._what_became_of_it()
        self._unlock()
        self._take()
        return event

    def _what_became_of_it(self) -> str:
        assert self._folder_lock is not None
        held, now = os.fstat(self._folder_lock), Path(os.readlink(f"/proc/self/fd/{self._folder_lock}"))
        if self.path.exists() and os.path.samestat(held, os.stat(self.path)):
            return f"run.dir {self.path}: its {LOCK_FILE} was deleted and has been re-created"
        if not held.st_nlink or not now.exists():
            return (
                f"run.dir {self.path} was deleted during the run; its contents are lost, and the folder is re-created"
            )
        return (
            f"run.dir {self.path} was renamed to {now}: metrics go on there, checkpoints into a new {self.path}; to "
            f"have all in one, stop the run, move {self.path}/checkpoints/* to {now}/checkpoints, and resume with "
            f"run.dir={now}"
        )

    def _take(self) -> None:
        """Make the folder, if need be, and lock it."""
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
        except BlockingIOError:
            self._unlock()
            raise UserError(f"run.dir {self.path}: another run is using it; choose another run.dir") from None
        except OSError as error:
            self._unlock()
            raise UserError(f"run.dir {self.path}: cannot be written to ({error.strerror or error})") from None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._unlock_folder()

    def _unlock_folder(self) -> None:
        if self._folder_lock is not None:
            os.close(self._folder_lock)
        self._folder_lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go; a folder that was made here and holds nothing else goes too."""
        with contextlib.suppress(OSError):  # removed meanwhile: the error that ends the run is the one to report
            if self._made and os.listdir(self.path) == [LOCK_FILE]:
                shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()
