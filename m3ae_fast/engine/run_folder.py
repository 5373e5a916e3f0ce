"""A run folder has one owner: whoever holds its lock."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from m3ae_fast.errors import UserError

LOCK_FILE = ".lock"


class RunFolder:
    """Holds the folder from its making until `close`; use as a context manager.

    The lock is POSIX's (`lockf`): it ends with this process, however that ends, and unlike flock's does not pass to
    loader workers.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where `path` cannot be written to, or another run holds it."""
        self.path = path
        self._made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self._lock = self._take()

    def keep(self) -> None:
        """Take the lock anew where its file was removed. Raises UserError where another run was faster."""
        try:
            same = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK_FILE))
        except OSError:
            same = False
        if not same:
            self._lock.close()
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(error) from None
            self._lock = self._take()

    def _take(self) -> BinaryIO:
        try:
            lock = (self.path / LOCK_FILE).open("wb")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"run.dir {self.path}: another run is using it; choose another run.dir") from None
            raise self._unwritable(error) from None
        return lock

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"run.dir {self.path}: cannot be written to ({error.strerror or error})")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go; a folder that was made here and holds nothing else goes too."""
        if self._made and os.listdir(self.path) == [LOCK_FILE]:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
