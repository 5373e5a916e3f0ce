"""Run of some tests against a mutant, in a forked process in which libraries are imported, but no module of this
project."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from lab.mutation.mutants import Mutant

LIBRARIES = (
    "pytest", "_pytest.assertion.rewrite", "hypothesis", "torch", "torch._dynamo", "torch._inductor.config", "triton",
    "torch.utils.data", "torch.distributed", "torchvision.transforms.v2", "numpy", "PIL.Image", "pydantic", "psutil",
    "safetensors.torch", "tokenizers", "webdataset", "rich.progress", "deepspeed", "huggingface_hub",
)  # fmt: skip
HUNG = "hangs"


@dataclass
class Verdict:
    noticed: str | None  # the test that notices the mutant, or a description; None: no test does
    seconds: float


def import_libraries() -> None:
    for name in LIBRARIES:
        import_module(name)


def trial(mutant: Mutant, tests: list[str], tree: Path, limit_s: float) -> Verdict:
    """Run the tests until one fails, with the mutant applied to `tree`, a copy of the repository.

    `limit_s`: limit of the CPU time in seconds; the limit of the wall-clock time is ten times as long.
    """
    path, start = tree / mutant.file, time.monotonic()
    source, times = path.read_bytes(), path.stat()
    path.write_bytes(mutant.applied(source))
    log = tree / "trial.log"
    try:
        pid = os.fork()
        if pid == 0:
            _test(tests, tree, limit_s, log)
        status = _wait(pid, 10 * limit_s)
    finally:
        path.write_bytes(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    seconds = time.monotonic() - start
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Verdict(HUNG, seconds)
    if os.WIFSIGNALED(status):
        return Verdict(f"dies of {signal.Signals(os.WTERMSIG(status)).name}", seconds)
    output = log.read_text(errors="replace")
    if os.WEXITSTATUS(status) == 0:
        return Verdict(None, seconds)
    if os.WEXITSTATUS(status) in (1, 2):
        failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return Verdict(failed[0].partition(" ")[2] if failed else "an error while tests are imported", seconds)
    raise RuntimeError(f"{mutant.name}: pytest could not run:\n{output[-2000:]}")


def _wait(pid: int, limit_s: float) -> int | None:
    """Wait for a process and return its exit status; None if it exceeded the limit and was killed."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            os.killpg(pid, signal.SIGKILL) if _group_is_there(pid) else None
            return status
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _group_is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _test(tests: list[str], tree: Path, limit_s: float, log: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 5))
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "kernels"), *(p for p in sys.path if p)]
    os.environ["PYTHONPATH"] = f"{tree}:{tree / 'kernels'}"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "m3ae_fast", "m3ae_kernels")]:
        del sys.modules[name]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.dont_write_bytecode = True
    import pytest

    code = 3
    try:
        code = pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-W", "ignore"])
    finally:
        sys.stdout.flush()
        os._exit(code)
