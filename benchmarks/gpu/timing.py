"""Timing of an op and its baselines: forward, backward and both, with the minimum possible time as a fraction of the
measured time."""

from __future__ import annotations

import m3ae_kernels
import torch

from benchmarks.baselines import baselines
from benchmarks.measure import CpuDevice, CudaDevice, measure
from benchmarks.ops import Cost, Workload
from benchmarks.results import Row
from m3ae_fast.base.hardware import data_sheet

OURS = "m3ae_kernels"


def time_op(
    device: CpuDevice | CudaDevice, work: Workload, compiled: bool, rounds: int = 5, repeats: int = 10
) -> list[Row]:
    """Return a row per phase and implementation. `compiled`: whether torch.compile is one of the baselines."""
    forward, backward, both = {}, {}, {}
    learned = [work.tensors[name] for name in work.learned]
    for name, module in {OURS: m3ae_kernels, **baselines(work, compiled)}.items():
        try:
            out = work.call(module)
            upstream = work.upstream(out)
            torch.autograd.grad(out, learned, upstream, retain_graph=True, allow_unused=True)
        except Exception as error:  # a failure of another library is reported, and the timing continues
            if name == OURS:
                raise
            print(f"{work.name}: {name} left out: {next(iter(str(error).splitlines()), repr(error))}", flush=True)
            continue
        forward[name] = lambda module=module: work.call(module)
        backward[name] = lambda out=out, up=upstream: torch.autograd.grad(
            out, learned, up, retain_graph=True, allow_unused=True
        )
        both[name] = lambda module=module, up=upstream: torch.autograd.grad(
            work.call(module), learned, up, allow_unused=True
        )
    total = tuple(a + b for a, b in zip(work.forward, work.backward))
    rows: list[Row] = []
    for phase, functions, cost in (
        ("forward", forward, work.forward),
        ("backward", backward, work.backward),
        ("both", both, total),
    ):
        for name, t in measure(device, functions, rounds, repeats).items():
            row: Row = {"op": work.name, "phase": phase, "implementation": name}
            row |= {"p20 ms": t.p20, "p50 ms": t.p50, "p80 ms": t.p80}
            least = least_ms(cost, device.name)
            rows.append(row | {"of roofline": least and least / t.p50, "peak MB": t.peak_mb})
    return rows


def least_ms(cost: Cost, device_name: str) -> float | None:
    """Return the minimum possible time in milliseconds for (FLOPs, bytes) according to the peaks of a device; None if
    the peaks are unknown."""
    peaks = data_sheet(device_name)
    return None if peaks is None else 1e3 * max(cost[0] / peaks.flops, cost[1] / peaks.bandwidth)


def line(row: Row) -> str:
    """Return a line that describes a row."""
    reached = "" if row["of roofline"] is None else f"  {row['of roofline']:4.0%} of the roofline"
    peak = "" if row["peak MB"] is None else f"  {row['peak MB']:7.0f} MB"
    return f"{row['op']:28} {row['phase']:9} {row['implementation']:27} {row['p50 ms']:9.3f} ms{reached}{peak}"
