"""python -m benchmarks.gpu [--quick | --odd | --tune | --step | --all] [--budget SECONDS]: checks every kernel on the
GPU and times it beside the baselines; or finds block sizes; or times whole training steps; or all of it, in stages.

Results are written after each op, kernel or step, so that a run which ends early has what it measured. Exit code 1
where a check, step or stage fails, 2 where there is no GPU, 3 where --all has stages left for another call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu import plan
from benchmarks.gpu.budget import budget
from benchmarks.gpu.check import DTYPES, Check, check_small, check_timed
from benchmarks.gpu.timing import line, time_op
from benchmarks.gpu.tune import tune
from benchmarks.measure import CpuDevice, CudaDevice
from benchmarks.ops import LARGE, ODD, OPS, Sizes, make

BUDGET, ALL_BUDGET = 480, 570  # seconds


def check_and_time(
    device: CpuDevice | CudaDevice,
    checks: list[Check],
    folder: Path | None = None,
    *,
    sizes: Sizes = LARGE,
    small: Sizes = ODD,
    quick: bool = False,
    odd: bool = False,
    dtypes: Sequence[torch.dtype] = DTYPES,
    compiled: bool = True,
    rounds: int = 5,
    repeats: int = 10,
) -> None:
    """Check the inputs of every op, then time it on them; then check `small` odd sizes in all dtypes.

    `quick`: nothing is timed; `odd`: nor are large inputs checked, which are in bf16. Fills `checks`, and writes
    gpu-checks.json and gpu-ops.json into `folder` (None: this machine's) as it goes.
    """
    rows: list[results.Row] = []
    where = f"M3AE-Large at {sizes.samples} samples"

    def checked(check: Check) -> None:
        checks.append(check)
        print(f"{check.op:28} {check.sizes:11} {check.dtype:9} {_verdict(check)}", flush=True)
        title = f"Checks of the ops: odd sizes against float64, {where} against float32"
        results.save("gpu-checks", title, [c.row() for c in checks], folder)

    for name in OPS if torch.bfloat16 in dtypes and not odd else ():
        work = make(name, sizes, torch.bfloat16, device.device)
        checked(check_timed(work))
        if quick:
            continue
        for row in time_op(device, work, compiled, rounds, repeats):
            rows.append(row)
            print(line(row), flush=True)
        title = f"Ops in bf16, {where} (loss ops make their gradients forward)"
        results.save("gpu-ops", title, rows, folder)
        torch._dynamo.reset()
    for dtype in dtypes:
        for name in OPS:
            checked(check_small(name, dtype, device.device, small))


def _verdict(check: Check) -> str:
    return "; ".join(check.problems) or f"ok, {check.worst:.2f} of the allowed error"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    what = found.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="checks alone, no timing")
    what.add_argument("--odd", action="store_true", help="checks of small odd sizes alone")
    what.add_argument("--tune", action="store_true", help="find block sizes for this GPU and write its table")
    what.add_argument("--step", action="store_true", help="whole training steps; needs m3ae_fast installed")
    what.add_argument("--all", action="store_true", help="every stage of plan.py; call again for those that are left")
    found.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"end after so long (default {BUDGET}; --all: {ALL_BUDGET})"
    )
    found.add_argument("--dtype", choices=[_name(d) for d in DTYPES], help="check one alone")
    found.add_argument("--no-compile", action="store_true", help="without torch.compile among the baselines")
    found.add_argument("--size", choices=plan.SIZES, help="of --step: this alone")
    found.add_argument("--on", choices=("deepspeed", "torch", "expert"), help="of --step: what runs it, alone")
    found.add_argument("--samples", type=int, help="of --step: a GPU's batch (default 512)")
    found.add_argument("--recompute", action="store_true", help="of --step: GELU and norms, as where memory lacks")
    found.add_argument("--results", type=Path, metavar="DIR", help="where to write (default benchmarks/results/GPU)")
    return found


def main(arguments: list[str] | None = None, **options: Any) -> int:
    """Run the benchmarks; `options` are those of `check_and_time`."""
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device on this machine; nothing to measure", file=sys.stderr)
        return 2
    if args.all:  # before this process takes memory on the GPU
        return plan.run(args.results or results.here(), args.budget or ALL_BUDGET)
    print(f"{results.device_name()}, torch {torch.__version__}", flush=True)
    checks: list[Check] = []
    failed = 0
    with budget(args.budget or BUDGET):
        if args.step:
            failed = _steps(args)
        elif args.tune:
            for dtype in (torch.bfloat16, torch.float32):
                tune(CudaDevice(), options.get("sizes", LARGE), dtype, args.results)
        else:
            dtypes = [dtype for dtype in DTYPES if args.dtype in (None, _name(dtype))]
            options = {"compiled": not args.no_compile, "dtypes": dtypes, **options}
            quick = args.quick or args.odd
            check_and_time(CudaDevice(), checks, args.results, quick=quick, odd=args.odd, **options)
    return 1 if failed or any(c.problems for c in checks) else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(args: argparse.Namespace) -> int:
    """Return how many runs failed."""
    from benchmarks.gpu import step

    changes = {"recompute": args.recompute} | ({} if args.samples is None else {"batch": args.samples})
    cases = step.shipped((args.size,)) if args.size else step.shipped()
    names = [step.IMPLEMENTATIONS[args.on]] if args.on else list(step.IMPLEMENTATIONS.values())
    return step.run(args.results, [replace(case, **changes) for case in cases], names)


if __name__ == "__main__":
    sys.exit(main())
