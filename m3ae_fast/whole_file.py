"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from m3ae_fast.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends. The folder is made where needed.

    Raises:
        UserError: `path` is a folder, or the disk refuses. `path` is as it was, then and after any other exception.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
