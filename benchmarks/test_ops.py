"""Benchmarks of each op, forward and backward, compared with eager torch, with torch.compile and, for the token loss,
with the losses of torch and of other libraries. The sizes are those of M3AE-Small on a CPU (32 samples) and those of
M3AE-Large on a GPU (512 samples), where `python -m benchmarks.gpu` gives more detailed results."""

from functools import partial
from types import SimpleNamespace

import m3ae_kernels
import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.attention import Segments
from m3ae_kernels.attention.padded import padded_attention

from benchmarks import results
from benchmarks.alone import peak_above
from benchmarks.baselines import baselines
from benchmarks.measure import CpuDevice, CudaDevice, measure
from benchmarks.ops import LARGE, OPS, Sizes, Workload, make
from benchmarks.workload import PRECISION

DEVICE = CudaDevice() if torch.cuda.is_available() else CpuDevice()
SMALL = Sizes(samples=32, patch=16, grid=14, visible=49, words=20, encoder=384, decoder=512, vocab=30522)
DTYPE = torch.bfloat16 if PRECISION == "bf16" else torch.float32
SIZES = LARGE if torch.cuda.is_available() else SMALL
ROWS: list[results.Row] = []
BOTH = "both passes"
# names in baselines.py; on a CPU, Liger has no driver, and cut_cross_entropy 25.1 does not support a bias
RIVALS = ("torch.compile", "torch linear_cross_entropy", "Liger", "ml-cross-entropy")


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        kinds = (
            "loss ops compute their gradients in the forward pass; -: does not run on this machine or was not measured"
        )
        title = f"Ops in {PRECISION} at {SIZES.samples} samples ({kinds})"
        results.write("ops", title, ROWS)


def attention(heads: int = 16) -> tuple[Workload, dict]:
    """Return self-attention over captions of 8 to 32 tokens and its implementations. Eager torch pads to the longest
    caption, with a mask."""
    torch.manual_seed(0)
    lengths = 1 + SIZES.grid**2 + torch.randint(8, 33, (SIZES.samples,))
    rows, longest = int(lengths.sum()), int(lengths.max())
    ends = F.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE.device)
    segments = Segments(ends, longest, rows)
    shape = (rows, 3, heads, SIZES.decoder // heads)

    def packed(qkv):
        return m3ae_kernels.packed_attention(qkv, ends, longest)

    def padded(qkv):
        return padded_attention(*qkv.unbind(1), segments, segments)

    tensors = {"qkv": torch.randn(shape, dtype=DTYPE, device=DEVICE.device).requires_grad_()}
    ours, eager = (SimpleNamespace(attention=f) for f in (packed, padded))
    return Workload("attention", "attention", tensors, ("qkv",)), {"engine": ours, "eager": eager}


def case(name: str) -> tuple[Workload, dict]:
    """Return the workload of an op and its implementations: the engine, eager torch, and those of `RIVALS` that run on
    this machine."""
    if name == "attention":
        return attention()
    work = make(name, SIZES, DTYPE, DEVICE.device)
    others = baselines(work)
    rivals = {name: others[name] for name in RIVALS if name in others and runs(work, others[name])}
    return work, {"engine": m3ae_kernels, "eager": others["eager"], **rivals}


def runs(work: Workload, module: object) -> bool:
    """Return whether a library's op runs on this machine. It is compiled in the process if necessary."""
    try:
        work.run(module)
    except Exception as error:  # any error, such as a missing driver or an argument that this version does not support
        print(f"{work.name}: left out: {' '.join(str(error).split()) or repr(error)}")
        return False
    return True


@pytest.mark.parametrize("name", ["attention", *OPS])
def test_op(benchmark, name):
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
    outs.clear()
    for name, column in (("engine", "peak memory, MB"), ("eager", "peak memory, eager torch, MB")):
        row[column] = peak_above(partial(both, name), DEVICE.device) / 1e6
    ROWS.append(row)
    benchmark.pedantic(both, ("engine",), rounds=3)
    benchmark.extra_info |= row
