"""Benchmarks of each op, forward and backward, compared with eager torch, with torch.compile and, for the token loss,
with the losses of torch and of other libraries, with the matrix products alone, and with the limit of the machine. The
sizes are those of M3AE-Small on a CPU (32 samples) and those of M3AE-Large on a GPU (512 samples)."""

from dataclasses import replace
from functools import partial

import m3ae_kernels
import pytest
import torch
from m3ae_kernels.tuning.timing import CpuDevice, CudaDevice
from m3ae_kernels.tuning.workloads import LARGE, OPS, Sizes, Workload, make

from benchmarks import results
from benchmarks.alone import peak_above
from benchmarks.apart import measured
from benchmarks.baselines import baselines
from benchmarks.limit import least_ms
from benchmarks.measure import measure
from benchmarks.workload import IMAGE_SIZE, PRECISION

DEVICE = CudaDevice() if torch.cuda.is_available() else CpuDevice()
SMALL = Sizes(samples=32, patch=16, grid=16, visible=64, words=20, encoder=384, decoder=512, vocab=30522)
DTYPE = torch.bfloat16 if PRECISION == "bf16" else torch.float32
GRID = IMAGE_SIZE // LARGE.patch
SIZES = replace(LARGE if torch.cuda.is_available() else SMALL, grid=GRID, visible=GRID**2 // 4)
ROWS: list[results.Row] = []
BOTH = "both passes"
# names in baselines.py; on a CPU, Liger has no driver, and cut_cross_entropy 25.1 does not support a bias
RIVALS = ("torch.compile", "matmuls alone", "torch linear_cross_entropy", "Liger", "ml-cross-entropy")


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        kinds = (
            "loss ops compute their gradients in the forward pass; -: does not run on this machine or was not measured"
        )
        title = f"Ops in {PRECISION} for {SIZES.samples} samples of {IMAGE_SIZE} px ({kinds})"
        results.write("ops", title, ROWS)


def case(name: str) -> tuple[Workload, dict]:
    """Return the workload of an op and its implementations: the engine, eager torch, and those of `RIVALS` that run on
    this machine."""
    work = make(name, SIZES, DTYPE, DEVICE.device)
    others = baselines(work)
    rivals = {name: others[name] for name in RIVALS if name in others and runs(work, others[name])}
    return work, {"engine": m3ae_kernels, "eager": others["eager"], **rivals}


def runs(work: Workload, module: object) -> bool:
    """Return whether a library's op runs on this machine. The trial run also compiles the op if necessary."""
    try:
        work.run(module)
    except Exception as error:  # any error, such as a missing driver or an argument that this version does not support
        print(f"{work.name}: left out: {' '.join(str(error).split()) or repr(error)}")
        return False
    return True


@pytest.mark.parametrize("name", OPS)
def test_op(name):
    ROWS.append(measured(row_of, name))


def row_of(name: str) -> results.Row:
    """Measure an op, and return its row of the table."""
    work, modules = case(name)
    learned = [work.tensors[name] for name in work.learned]
    outs = {name: work.call(modules[name]) for name in ("engine", "eager")}
    upstream = {name: work.upstream(work.call(module)) for name, module in modules.items()}

    def both(name: str) -> None:
        work.run(modules[name], upstream[name])

    def backward(name: str) -> None:
        torch.autograd.grad(outs[name], learned, upstream[name], retain_graph=True)

    phases = {"forward": lambda name: work.call(modules[name]), "backward": backward, BOTH: both}
    row: results.Row = {"op": work.name}
    for phase, run in phases.items():
        measured = list(modules) if phase == BOTH else ["engine", "eager"]
        times = measure(DEVICE, {name: partial(run, name) for name in measured}, rounds=3, repeats=3)
        row |= {f"{phase}, ms": times["engine"].p50, f"{phase}, eager torch, ms": times["eager"].p50}
    row |= {f"{BOTH}, {name}, ms": times[name].p50 if name in times else None for name in RIVALS}
    row["limit of both passes by FLOPs and bytes, ms"] = least_ms(
        tuple(a + b for a, b in zip(work.forward, work.backward)), DEVICE.device, DTYPE
    )
    outs.clear()
    for name, column in (("engine", "peak memory, MB"), ("eager", "peak memory, eager torch, MB")):
        row[column] = peak_above(partial(both, name), DEVICE.device) / 1e6
    return row
