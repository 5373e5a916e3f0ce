"""Reading of metrics.jsonl, the log of a run in its folder; `training/metrics_log.py` writes it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run folder's metrics.jsonl that have a step. Raises UserError if there are none."""
    try:
        lines = metrics_lines(folder / METRICS_FILE)
    except OSError as error:
        raise UserError(f"{folder}: not a run folder ({METRICS_FILE}: {error.strerror})") from None
    if not lines:
        raise UserError(f"{folder / METRICS_FILE}: contains no steps yet")
    return lines


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that have a step; lines that are not complete are left out. Raises OSError if the file
    cannot be read."""
    lines = []
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue  # an incomplete line
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines
