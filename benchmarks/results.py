"""Storage of results: each machine has one JSON file with a table for each benchmark. A table has named columns, and
describes the machine, the versions and the date."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

import m3ae_fast
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.hardware import this_cpu

RESULTS = Path(__file__).parent / "results"  # contains a file per machine
Row = dict[str, str | int | float | None]
Table = dict[str, Any]  # title, about and rows
WRITTEN: list[tuple[Path, str]] = []  # the tables of this process in Markdown, with the files in which they are stored


def about() -> dict[str, str | float]:
    """Return the machine, the versions and the date. If the load average `load` exceeds `cores`, other programs were
    running as well."""
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "m3ae_fast": m3ae_fast.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    """Return the name of this machine's GPU, or of its CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return this_cpu().name or platform.processor() or "CPU"


def here() -> Path:
    """Return the file of this machine."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json")


def read(path: Path) -> dict[str, Table]:
    """Return the tables of a machine by the name of the benchmark; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(name: str, title: str, rows: Sequence[Row], path: Path | None = None) -> None:
    """Store a table in `WRITTEN` and in the file of a machine, whose other tables stay unchanged. `path`: this file;
    None: the file of this machine. All rows must have the same columns."""
    path = path or here()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"title": title, "about": about(), "rows": list(rows)}
    write_text_atomically(path, json.dumps(read(path) | {name: table}, indent=1) + "\n")
    WRITTEN.append((path, markdown(table)))


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its title."""
    a, rows = table["about"], table["rows"]
    columns = list(rows[0])
    threads = f"{a['threads']} thread{'s' if a['threads'] != 1 else ''} on "
    threads += f"{a['cores']} core{'s' if a['cores'] != 1 else ''}"
    lines = [f"**{table['title']}** ({a['device']}, {threads}, torch {a['torch']}, {a['date']})", ""]
    lines.append("| " + " | ".join(columns) + " |")
    numeric = [not any(isinstance(row[c], str) for row in rows) for c in columns]
    lines.append("|" + "|".join("--:" if n else "---" for n in numeric) + "|")
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
