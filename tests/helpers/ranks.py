"""Processes that run a program's `main` as `python` or torchrun would, but with all modules already imported.

They are forked from a server that has imported torch and the trainer, because these imports take longer than a tiny
run. Launchers, and events during the imports of a program, are tested with ordinary processes.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.context import ForkServerProcess as Process
from multiprocessing.forkserver import ensure_running
from pathlib import Path

LIMIT_S = 500
_SHOW_STACKS = signal.SIGUSR2  # makes a late rank print the stack traces of all its threads
_forks = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "m3ae_fast.train",
    "m3ae_fast.training.dry_run",
    "m3ae_fast.training.run",
    "m3ae_fast.evaluation.knn_during_training",
    "deepspeed",
)
# modules that a ZeRO engine or a logger imports when it is created
_LATE = (
    "m3ae_fast.engine.deepspeed_engine",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
)
_forks.set_forkserver_preload(["pytest", *_IMPORTED, *_LATE, __name__])


def environment() -> dict[str, str]:
    """Return environment variables for programs: those of this process, but with one core, no GPU and no launcher."""
    launched = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    )
    slurm = ("SLURM_", "OMPI_", "PMI_")
    return {k: v for k, v in os.environ.items() if k not in launched and not k.startswith(slurm)} | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def free_port() -> int:
    """Return a free port below the range from which the system assigns ports. The system might assign a port of this
    range to another test before rank 0 listens on it. The other ranks would then connect to that test instead of rank
    0."""
    while True:
        # The seeded generator is not used, because tests that run in parallel would draw the same ports.
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def fork_ranks(module: str, arguments: list[str], ranks: int, log: Path) -> list[Process]:
    """Start `module.main(arguments)` on `ranks` ranks, each in its own session. Their output is written to `log`."""
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    each = [launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    return fork_each(module, arguments, each, log)


def fork_each(module: str, arguments: list[str], each: list[dict[str, str]], log: Path) -> list[Process]:
    """Start processes as `fork_ranks` does, one for each set of environment variables in `each`."""
    # Programs of the package set this variable in `configure_libraries`, before torch is imported. Otherwise, torch may
    # print a warning if rank 0 ends first.
    with _environment(environment() | {"TORCH_CPP_LOG_LEVEL": "ERROR"}):
        ensure_running()
    processes = []
    for variables in each:
        processes.append(_forks.Process(target=_run, args=(module, arguments, variables, log)))
        processes[-1].start()
    return processes


def run_ranks(module: str, arguments: list[str], ranks: int, log: Path) -> tuple[int, str]:
    """Run `module.main(arguments)` on `ranks` ranks to the end. Return the first exit code that is not 0, or 0 if all
    ranks have succeeded, and the output. If a rank has not ended after LIMIT_S, the test fails with the stack traces of
    all late ranks."""
    return await_ranks(fork_ranks(module, arguments, ranks, log), log)


def await_ranks(processes: list[Process], log: Path) -> tuple[int, str]:
    """Wait for the end of processes; see `run_ranks`."""
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        os.kill(process.pid or 0, _SHOW_STACKS)
    for process in late:
        process.join(2)  # in the meantime, it writes its stack traces
        process.kill()
    out = log.read_text() if log.exists() else ""
    assert not late, f"{len(late)} of {len(processes)} ranks are still at work after {LIMIT_S} s:\n{out}"
    return next((process.exitcode for process in processes if process.exitcode), 0), out


def _run(module: str, arguments: list[str], variables: dict[str, str], log: Path) -> None:
    from m3ae_fast.base.errors import exit_cleanly
    from m3ae_fast.training import run

    run.peak_flops = lambda device, dtype: 1e12  # measuring it takes longer than a step
    multiprocessing.set_start_method(None, force=True)  # restores the default start method for loader workers
    gc.freeze()  # DeepSpeed collects garbage for every engine, which takes less time without the imported objects
    os.setsid()
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(_SHOW_STACKS, file=2)
    code: str | int | None = None
    try:
        code = exit_cleanly(lambda: import_module(module).main(arguments))
    except SystemExit as end:  # handled before the functions below, because its traceback keeps connections open
        code = end.code
    finally:
        atexit._run_exitfuncs()  # a program would run these functions when it exits, but multiprocessing does not
    sys.exit(code)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    yield
    os.environ.clear()
    os.environ.update(before)
