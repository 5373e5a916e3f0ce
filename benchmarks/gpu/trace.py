"""Summary of a torch profiler trace of training steps: time by kind of kernel, time without any kernel, and the kernels
that take the most time."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from m3ae_kernels.aot import CASES

from benchmarks.results import Row

OWN = "|".join(rf"\b{case.kernel}_kernel\b" for case in CASES)
# Kinds of kernels, each with a pattern of names; the first match counts. The patterns cover torch, cuBLAS, CUTLASS,
# inductor, flash-attn, apex, DeepSpeed and NCCL.
PARTS = {
    "communication": r"nccl",
    "attention": r"flash|fmha|attention|attn",
    "own ops": OWN,
    "optimiser": r"adam|multi_tensor|lamb",
    "matmul": r"gemm|cutlass|nvjet|cublas|xmma|wgmma|splitk|triton_tem",
    "copies": r"^mem(cpy|set)",
    "elementwise": r"",
}
IDLE = "idle"
LONGEST = 160  # maximum number of characters of a kernel's name; names of templates have thousands


def part_of(kernel: str) -> str:
    return next(part for part, names in PARTS.items() if re.search(names, kernel, re.IGNORECASE))


def breakdown(path: Path) -> list[Row]:
    """Return milliseconds per step and fractions of the time, by kind of kernel; no rows if the trace has no kernels.

    Kernels in different streams may overlap, so the fractions may add up to more than 1. "idle" is the time without any
    kernel.
    """
    kernels, steps = _read(path)
    if not kernels:
        return []
    spent = dict.fromkeys((*PARTS, IDLE), 0.0)
    busy_until = begin = kernels[0][0]
    for start, end, name in kernels:
        spent[part_of(name)] += end - start
        spent[IDLE] += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    whole = busy_until - begin
    each = 1e3 * steps  # converts microseconds of all steps to milliseconds per step
    rows: list[Row] = [{"part": p, "ms per step": us / each, "fraction": us / whole} for p, us in spent.items()]
    return [*rows, {"part": "whole", "ms per step": whole / each, "fraction": 1.0}]


def heaviest(path: Path, count: int = 40) -> list[Row]:
    """Return the kernels with the largest total time, with launches and milliseconds per step."""
    kernels, steps = _read(path)
    spent: dict[str, tuple[int, float]] = {}
    for start, end, name in kernels:
        launches, us = spent.get(name, (0, 0.0))
        spent[name] = launches + 1, us + end - start
    rows = sorted(spent.items(), key=lambda pair: -pair[1][1])[:count]
    return [
        {"kernel": name[:LONGEST], "part": part_of(name), "launches": n / steps, "ms per step": us / (1e3 * steps)}
        for name, (n, us) in rows
    ]


def _read(path: Path) -> tuple[list[tuple[float, float, str]], int]:
    """Return the start, end and name of every kernel in a trace in order, and the number of steps."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    steps = {e["name"] for e in events if e["name"].startswith("ProfilerStep#")}
    kernels = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat", "") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    return kernels, max(len(steps), 1)
