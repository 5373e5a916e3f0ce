"""Results on disk: in a machine's folder a JSON file a benchmark, a table of named columns with where and when."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import m3ae_fast
from benchmarks import machine_folder
from m3ae_fast.hardware import this_cpu

Row = dict[str, str | int | float | None]


def about() -> dict[str, str | float]:
    """Machine, versions and date; `load` is the machine's load average: above `cores`, others were busy here too."""
    return {
        "device": _device(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "m3ae_fast": m3ae_fast.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return this_cpu().name or platform.processor() or "CPU"


def here() -> Path:
    """This machine's folder."""
    return machine_folder(_device())


def write(name: str, title: str, rows: list[Row], folder: Path | None = None) -> Path:
    """Writes NAME.json into `folder`, this machine's if None, and prints the table."""
    folder = folder or here()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    data = {"title": title, "about": about(), "rows": rows}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n" + markdown(data))
    return path


def markdown(data: dict) -> str:
    """One results file as a Markdown table under its title."""
    a, columns = data["about"], list(data["rows"][0])
    lines = [f"**{data['title']}** ({a['device']}, {a['cores']} cores, torch {a['torch']}, {a['date']})", ""]
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
