"""Benchmark of attention, forward and backward together: the kernel that training would use, padded eager torch, SDPA
and, on a GPU, every kernel that is installed, at the sizes of the encoder and of the decoder."""

from functools import partial

import m3ae_kernels
import pytest
from m3ae_kernels.tuning.workloads import OPS, make

from benchmarks import results
from benchmarks.apart import measured
from benchmarks.baselines import baselines
from benchmarks.limit import least_ms
from benchmarks.measure import measure
from benchmarks.test_ops import DEVICE, DTYPE, SIZES, runs
from benchmarks.workload import IMAGE_SIZE, PRECISION

ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        what = f"{SIZES.samples} samples of {IMAGE_SIZE} px in {PRECISION}, forward and backward"
        results.write("attention", f"Attention of {what}; limit: minimum time by FLOPs and bytes", ROWS)


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("packed_attention")])
def test_attention(name):
    ROWS.extend(measured(rows_of, name))


def rows_of(name: str) -> list[results.Row]:
    """Measure attention at the sizes of one part of the model, and return a row for each kernel that runs."""
    work = make(name, SIZES, DTYPE, DEVICE.device)
    modules = {"engine": m3ae_kernels} | baselines(work, compiled=False)
    modules = {kernel: module for kernel, module in modules.items() if kernel == "engine" or runs(work, module)}
    upstream = work.upstream(work.call(m3ae_kernels))
    passes = {kernel: partial(work.run, module, upstream) for kernel, module in modules.items()}
    times = measure(DEVICE, passes, rounds=3, repeats=3)
    least = least_ms(tuple(a + b for a, b in zip(work.forward, work.backward)), DEVICE.device, DTYPE)
    part = name.partition(", ")[2]
    return [
        {"part": part, "kernel": kernel, "ms": time.p50, "limit, ms": least, "limit / time": least / time.p50}
        for kernel, time in times.items()
    ]
