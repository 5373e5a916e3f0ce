"""Results as rows, as JSON and as Markdown; the roofline beside each time."""

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import machine_folder
from .check import Check
from .measure import Timing
from .workloads import Cost

# Dense 16-bit tensor-core FLOP/s and memory bytes/s, from NVIDIA's data sheets; the first name found counts.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-40": (312e12, 1.555e12),
    "A100": (312e12, 2.039e12),
    "B200": (2250e12, 8.0e12),
}


@dataclass
class Row:
    """One variant of one op in one phase; `roofline` is the share of the least possible time, None where not known."""

    op: str
    phase: str
    variant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mb: float | None
    roofline: float | None


def least_ms(cost: Cost, device_name: str) -> float | None:
    """The time that a device's peaks allow for (FLOPs, bytes)."""
    for name, (flops, bandwidth) in PEAKS.items():
        if name in device_name:
            return 1e3 * max(cost[0] / flops, cost[1] / bandwidth)
    return None


def make_row(op: str, phase: str, variant: str, timing: Timing, cost: Cost, device_name: str) -> Row:
    least = least_ms(cost, device_name)
    share = None if least is None else least / timing.p50
    return Row(op, phase, variant, timing.p20, timing.p50, timing.p80, timing.peak_mb, share)


def environment(device_name: str) -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name,
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def markdown(about: dict[str, str], checks: list[Check], rows: list[Row], sizes: str) -> str:
    sound = sum(not c.problems for c in checks)
    lines = [
        f"# Kernels on {about['device']}",
        "",
        f"{about['date']}, torch {about['torch']}, triton {about['triton']}. {sizes}, bfloat16. Loss ops compute their "
        "gradients in the forward pass.",
        "",
        f"{sound} of {len(checks)} checks against float64 pass.",
        *(f"- {c.op}, {c.dtype}: {'; '.join(c.problems)}" for c in checks if c.problems),
        "",
        "| op | phase | variant | p20 ms | p50 ms | p80 ms | of roofline | peak MB |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        share = "-" if r.roofline is None else f"{r.roofline:.0%}"
        peak = "-" if r.peak_mb is None else f"{r.peak_mb:.0f}"
        times = f"{r.p20_ms:.3f} | {r.p50_ms:.3f} | {r.p80_ms:.3f}"
        lines.append(f"| {r.op} | {r.phase} | {r.variant} | {times} | {share} | {peak} |")
    return "\n".join(lines) + "\n"


def write(folder: Path | None, about: dict[str, str], checks: list[Check], rows: list[Row], sizes: str) -> list[Path]:
    """Writes kernels.json and kernels.md into `folder`, the GPU's own if None; returns their paths."""
    folder = folder or machine_folder(about["device"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"kernels.{ending}" for ending in ("json", "md")]
    data = {"about": about, "sizes": sizes, "checks": [asdict(c) for c in checks], "rows": [asdict(r) for r in rows]}
    paths[0].write_text(json.dumps(data, indent=1) + "\n")
    paths[1].write_text(markdown(about, checks, rows, sizes))
    return paths
