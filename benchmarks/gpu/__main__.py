"""python -m benchmarks.gpu [--tune] [--quick] [--step]: checks every kernel on the GPU and times it beside its rivals.

Exit code 1 where a check fails, 2 where there is no GPU.
"""

import argparse
import sys
import time
from pathlib import Path

import m3ae_kernels
import torch

from .check import check_all
from .measure import CpuDevice, CudaDevice, measure
from .report import Row, environment, make_row, markdown, write
from .rivals import rivals
from .tune import tune
from .workloads import LARGE, ODD, Sizes, Workload, workloads

SECONDS = 420  # after which no further rival is compiled or timed


def time_workload(
    device: CpuDevice | CudaDevice, work: Workload, modules: dict[str, object], rounds: int, repeats: int
) -> list[Row]:
    """Forward, backward and both, of every module that can run the op."""
    forward, backward, both = {}, {}, {}
    learned = [work.tensors[name] for name in work.learned]
    for name, module in modules.items():
        try:
            out = work.call(module)
            upstream = work.upstream(out)
            torch.autograd.grad(out, learned, upstream, retain_graph=True)
        except Exception as error:  # another library's trouble is not ours: say so and go on
            if module is m3ae_kernels:
                raise
            print(f"{work.name}: {name} left out: {str(error).splitlines()[0]}", flush=True)
            continue
        forward[name] = lambda module=module: work.call(module)
        backward[name] = lambda out=out, up=upstream: torch.autograd.grad(out, learned, up, retain_graph=True)
        both[name] = lambda module=module, up=upstream: work.run(module, up)
    total = tuple(a + b for a, b in zip(work.forward, work.backward))
    rows = []
    for phase, functions, cost in (
        ("forward", forward, work.forward),
        ("backward", backward, work.backward),
        ("both", both, total),
    ):
        timings = measure(device, functions, rounds, repeats)
        rows += [make_row(work.name, phase, name, t, cost, device.name) for name, t in timings.items()]
    return rows


def benchmark(
    device: CpuDevice | CudaDevice, sizes: Sizes, dtype: torch.dtype, compiled: bool, rounds: int = 5, repeats: int = 10
) -> list[Row]:
    """Rows of every op, printed as they come."""
    start, rows = time.monotonic(), []
    for work in workloads(sizes, dtype, device.device):
        modules = rivals(work, compiled)
        if time.monotonic() - start > SECONDS:
            modules = {"m3ae_kernels": modules["m3ae_kernels"]}
        for row in time_workload(device, work, modules, rounds, repeats):
            share = "" if row.roofline is None else f"  {row.roofline:4.0%} of the roofline"
            peak = "" if row.peak_mb is None else f"  {row.peak_mb:7.0f} MB"
            print(f"{row.op:28} {row.phase:9} {row.variant:17} {row.p50_ms:9.3f} ms{share}{peak}", flush=True)
            rows.append(row)
        torch._dynamo.reset()
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true", help="first find block sizes for this GPU and write its table")
    parser.add_argument("--quick", action="store_true", help="checks alone, no timing")
    parser.add_argument("--step", action="store_true", help="whole training steps instead; needs m3ae_fast")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for what is written; benchmarks/results/GPU if not given",
    )
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device on this machine; nothing to measure", file=sys.stderr)
        return 2
    if args.step:
        from ..step_gpu import run

        run(args.results)
        return 0
    device = CudaDevice()
    print(f"{device.name}, torch {torch.__version__}", flush=True)
    if args.tune:
        for dtype in (torch.bfloat16, torch.float32):
            tune(device, LARGE, dtype)
    checks = check_all(device.device, ODD)
    for c in checks:
        verdict = "; ".join(c.problems) or f"ok, {c.worst:.2f} of the allowed error"
        print(f"{c.op:28} {c.dtype:9} {verdict}", flush=True)
    if not args.quick:
        rows = benchmark(device, LARGE, torch.bfloat16, compiled=True)
        about, sizes = environment(device.name), f"M3AE-Large at {LARGE.samples} samples"
        paths = write(args.results, about, checks, rows, sizes)
        print(markdown(about, checks, rows, sizes))
        print("wrote " + " and ".join(map(str, paths)))
    return 1 if any(c.problems for c in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
