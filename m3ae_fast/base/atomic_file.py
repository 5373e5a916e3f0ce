"""Atomic writes: files and folders are either complete or absent, even after a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from m3ae_fast.base.errors import UserError

# errors that some network file systems raise if fsync is called on a folder
_CANNOT_SYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EACCES,
}


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` and rename it to `path` when the block ends. Missing parent folders are
    created. If several processes write the same file at once, the last one to finish wins. Raises UserError if `path`
    is a folder or cannot be written. After any exception, `path` is unchanged."""
    _require_file_in_folder(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.partial")
        with open(partial, "xb") as file:
            lock(file.fileno())
            yield partial
            put_in_place(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def require_writable(path: Path) -> None:
    """Raise UserError if `atomic_write(path)` is certain to fail. Programs call this before a long computation; nothing
    is created."""
    folder = _require_file_in_folder(path)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot be written (no permission to write to {folder}); choose another folder")


def _require_file_in_folder(path: Path) -> Path:
    """Return the folder that contains `path` or, if this folder does not exist, its closest parent folder that exists.
    Raises UserError if `path` is a folder, or one of its parents is a file."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; specify a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be written ({folder} is a file); choose another folder")
    return folder


@contextlib.contextmanager
def atomic_folder_write(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to `target`, and replace `target` with it when the block ends. Raises
    OSError if writing fails, and UserError if `target` can neither be replaced nor restored. After any exception except
    this UserError, `target` is unchanged."""
    mine = uuid.uuid4().hex[:8]
    partial, old = (target.with_name(f".{word}-{target.name}-{mine}") for word in ("writing", "removing"))
    try:
        remove_abandoned(target.parent, f".writing-{glob.escape(target.name)}-*")
        partial.mkdir(parents=True)
        with _held(partial):
            yield partial
            _replace(target, partial, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


def _replace(target: Path, partial: Path, old: Path) -> None:
    """Replace `target` with `partial`: rename `target` to `old`, move `partial` into place, then delete `old`."""
    if not target.exists():
        return put_in_place(partial, target)
    os.rename(target, old)
    try:
        put_in_place(partial, target)
    except BaseException:
        _restore(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(old: Path, target: Path) -> None:
    try:
        os.rename(old, target)
    except OSError as error:
        reason = f"{error.strerror or error}; its previous content is now in {old}"
        raise UserError(f"{target}: can neither be replaced nor restored ({reason})") from None


def lock(handle: int) -> None:
    """Lock an unfinished file or folder until its handle is closed, so that `is_abandoned` returns False for it. If the
    file system does not support such locks, nothing is locked, and no file counts as abandoned."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)


def is_abandoned(partial: Path) -> bool:
    """Return whether an unfinished file or folder is no longer locked, because the process that created it was
    killed."""
    try:
        handle = os.open(partial, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the unfinished files and folders in `folder` that match `pattern` and were left by killed processes."""
    for partial in filter(is_abandoned, folder.glob(pattern)):
        with contextlib.suppress(OSError):  # the file belongs to another user, or no longer exists
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file atomically. Raises UserError as `atomic_write` does."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a finished file, or a folder of files, to disk, and then rename it to `path`. Raises OSError if writing
    fails."""
    for written in (*(sorted(partial.iterdir()) if partial.is_dir() else ()), partial):
        sync_to_disk(written)
    os.replace(partial, path)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file's contents, or a folder's list of entries, to disk. Raises OSError if that fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _CANNOT_SYNC):
            raise
    finally:
        os.close(handle)
