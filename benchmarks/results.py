"""Storage of results: each machine has a folder with one JSON file per benchmark, which contains a table with named
columns, and describes the machine, the versions and the date."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

import m3ae_fast
from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.hardware import this_cpu

RESULTS = Path(__file__).parent / "results"  # contains a folder per machine
ELSEWHERE = "BENCHMARK_RESULTS"
Row = dict[str, str | int | float | None]


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
    """Return the folder for results: the folder of this machine, or the folder that is set for a stage of a plan."""
    if ELSEWHERE in os.environ:
        return Path(os.environ[ELSEWHERE])
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def write(name: str, title: str, rows: Sequence[Row], folder: Path | None = None) -> Path:
    """Save the rows as `save` does, and print the table."""
    path = save(name, title, rows, folder)
    print("\n" + markdown(path))
    return path


def save(name: str, title: str, rows: Sequence[Row], folder: Path | None = None) -> Path:
    """Write NAME.json to `folder` (None: the folder of this machine) atomically. All rows must have the same
    columns."""
    folder = folder or here()
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{name}.json", folder / f".{name}.json"
    data = {"title": title, "about": about(), "rows": rows}
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    put_in_place(partial, path)
    return path


def read(path: Path) -> list[Row]:
    """Return the rows of a results file; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def markdown(path: Path) -> str:
    """Return a results file as a Markdown table with its title."""
    data = json.loads(path.read_text(encoding="utf-8"))
    a, columns = data["about"], list(data["rows"][0])
    threads = f"{a['threads']} thread{'s' if a['threads'] != 1 else ''} on {a['cores']} cores"
    lines = [f"**{data['title']}** ({a['device']}, {threads}, torch {a['torch']}, {a['date']})", ""]
    lines.append("| " + " | ".join(columns) + " |")
    numeric = [not any(isinstance(row[c], str) for row in data["rows"]) for c in columns]
    lines.append("|" + "|".join("--:" if n else "---" for n in numeric) + "|")
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in data["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
