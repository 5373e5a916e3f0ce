"""Safe reading of untrusted files: pipes do not block, and malformed content raises ordinary errors."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any


def open_regular(path: str | Path) -> io.FileIO:
    """Open a file for unbuffered reading. Raises OSError if that fails, or if `path` is a folder, pipe or device, which
    might block."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a regular file")
    return open(fd, "rb", buffering=0)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file in UTF-8. Raises OSError as `open_regular` does, and ValueError as `parse_json`
    does."""
    with open_regular(path) as file:
        return parse_json(file.read().decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text. Raises ValueError if the text is not JSON, is nested too deeply or contains a
    key twice. (Python's json would silently keep only the last of two equal keys.)"""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return data
