"""python -m benchmarks.gpu [--quick | --odd | --tune | --step | --all] [--budget SECONDS]: checks every kernel on the
GPU and compares its time with baselines; or tunes block sizes; or times whole training steps; or does all of these, in
stages.

Results are written after each op, kernel or step, so that they are not lost if the run ends early. Checks, timing and
tuning run in a separate process, and continue in another process after a crash. The exit code is 1 if a check, step or
stage fails, 2 if there is no GPU, and 3 if --all has stages left for another call.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from m3ae_kernels import dispatch

from benchmarks import results
from benchmarks.gpu import plan, suite, tune
from benchmarks.gpu.budget import budget
from benchmarks.gpu.check import DTYPES
from benchmarks.measure import CudaDevice
from benchmarks.ops import LARGE

BUDGET, ALL_BUDGET = 480, 570  # seconds


def parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in plan.PLAN]
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    what = found.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="only check the kernels, without timing")
    what.add_argument("--odd", action="store_true", help="only check the kernels at small odd sizes")
    what.add_argument(
        "--tune",
        nargs="*",
        metavar="KERNEL",
        help="find the best block sizes on this GPU, for all kernels or only for the named ones",
    )
    what.add_argument("--step", action="store_true", help="time whole training steps; requires m3ae_fast")
    what.add_argument(
        "--all", action="store_true", help="run all stages of plan.py; call again to run the remaining stages"
    )
    found.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"time limit (default: {BUDGET}; with --all: {ALL_BUDGET})"
    )
    found.add_argument(
        "--again", nargs="+", default=(), choices=names, metavar="STAGE", help="with --all: stages to run again"
    )
    found.add_argument("--dtype", choices=[_name(d) for d in DTYPES], help="check or tune only in this dtype")
    found.add_argument("--no-compile", action="store_true", help="leave out the torch.compile baselines")
    found.add_argument("--size", choices=plan.SIZES, help="with --step: only this model size")
    found.add_argument("--on", choices=("deepspeed", "torch", "expert"), help="with --step: only this engine")
    found.add_argument("--samples", type=int, help="with --step: batch size per GPU (default: 512)")
    found.add_argument("--recompute", action="store_true", help="with --step: recompute GELU and norms, to save memory")
    found.add_argument("--results", type=Path, metavar="DIR", help="output folder (default: benchmarks/results/GPU)")
    # internal: set for the process that the program starts, which processes the items from this item on
    found.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None, **options: Any) -> int:
    """Run the benchmarks and return the exit code. `options`: see `check_and_time`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if args.again and not args.all:
        parser().error("--again can be used only with --all")
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device on this machine; nothing to measure", file=sys.stderr)
        return 2
    folder, seconds = args.results or results.here(), args.budget or (ALL_BUDGET if args.all else BUDGET)
    if args.all:
        return plan.run(folder, seconds, again=args.again)
    if args.step:
        failed = 0
        with budget(seconds):
            failed = _steps(args)
        return 1 if failed else 0
    dtypes = [dtype for dtype in DTYPES if args.dtype in (None, _name(dtype))]
    work = suite.items(quick=args.quick or args.odd, odd=args.odd, dtypes=dtypes)
    if args.first is None:  # this process starts the others, and uses no GPU memory itself
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        if args.tune is not None:
            return tune.in_processes([*command, "--from", "0"], folder, seconds)
        where = suite.sizes_of(options.get("sizes", LARGE))
        return suite.in_processes(lambda first: [*command, "--from", str(first)], work, folder, seconds, where)
    return _alone(args, work, dtypes, folder, options)


def _alone(
    args: argparse.Namespace, work: list[suite.Item], dtypes: list[torch.dtype], folder: Path, options: dict[str, Any]
) -> int:
    """Check, time or tune in this process, and return the exit code."""
    device = CudaDevice()
    # The project's own kernels are used, even if another library's attention kernel is faster on this GPU.
    os.environ.setdefault(dispatch.ENV, dispatch.choose_impl("auto", device.device))
    print(f"{results.device_name()}, torch {torch.__version__}", flush=True)
    failed, checks = 0, []
    try:
        with budget(args.budget or BUDGET):
            if args.tune is None:
                compiled = {"compiled": not args.no_compile} | options
                suite.check_and_time(device, work, checks, folder, first=args.first, **compiled)
            for dtype in dtypes if args.tune is not None else ():
                if dtype != torch.float16 or args.dtype:  # by default, float16 uses the table of bfloat16
                    failed += tune.tune(device, options.get("sizes", LARGE), dtype, folder, only=args.tune)
    except suite.DeviceBroken as error:
        print(f"this process can no longer use the GPU: {error.__cause__}", flush=True)
        return suite.BROKEN
    return 1 if failed or any(check.problems for check in checks) else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(args: argparse.Namespace) -> int:
    """Time whole training steps, and return the number of runs that failed."""
    from benchmarks.gpu import step

    changes = {"recompute": args.recompute} | ({} if args.samples is None else {"batch": args.samples})
    cases = step.shipped((args.size,)) if args.size else step.shipped()
    names = [step.IMPLEMENTATIONS[args.on]] if args.on else list(step.IMPLEMENTATIONS.values())
    return step.run(args.results, [replace(case, **changes) for case in cases], names)


if __name__ == "__main__":
    sys.exit(main())
