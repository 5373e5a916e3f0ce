"""A program that runs out of memory ends with a one-line error, wherever this happens."""

import resource
import subprocess
import sys
import threading

import pytest
import torch

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.process.background import Background
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT

CONFIG = str(ROOT / "configs/quickstart.json")
TOO_LITTLE = 300 << 20  # bytes of address space, less than torch's libraries require


def under_limit(*arguments, limit=TOO_LITTLE):
    """Run Python under `ulimit -v`."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "m3ae_fast", "train", "--config", CONFIG],
        ["-m", "m3ae_fast", "shards", "table", "--help"],
        [str(ROOT / "m3ae_fast/train.py"), "--config", CONFIG],
    ],
    ids=str,
)
def test_too_little_memory_to_import_torch_is_reported_in_one_line(command):
    done = under_limit(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: not enough memory (")
    assert "ulimit -v limits the address space of this process to 0.31 GB" in done.stderr


@pytest.mark.parametrize("limit", [600 << 20, 1200 << 20])  # torch's libraries abort or hang
def test_too_little_memory_for_torchs_threads_is_reported_in_one_line(limit):
    done = under_limit("-m", "m3ae_fast", "train", "--help", limit=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: not enough memory (importing torch alone needs 1.5 GB of address space); ulimit -v limits"
    )


def test_importing_the_library_keeps_tracebacks_of_memory_errors():
    done = under_limit("-c", "import m3ae_fast; raise MemoryError")
    assert done.returncode == 1 and "Traceback" in done.stderr


def too_much():
    torch.empty(1 << 55)


def too_much_for_python():
    bytearray(1 << 55)


@pytest.mark.parametrize("main", [too_much, too_much_for_python])
def test_an_allocation_that_is_too_large_ends_the_command_with_one_line(main, capsys, monkeypatch):
    assert exit_cleanly(main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: not enough memory (") and err.count("\n") == 1
    assert err.endswith("; close other programs, or process less data at a time\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2_500_000_000, resource.RLIM_INFINITY))
    assert exit_cleanly(main) == 2
    assert capsys.readouterr().err.endswith(
        "; ulimit -v limits the address space of this process to 2.5 GB: raise this limit first\n"
    )


def test_other_errors_are_not_reported_as_out_of_memory(monkeypatch):
    def wrong():
        # as for a new thread, if the number of processes is limited
        raise RuntimeError("Resource temporarily unavailable")

    with pytest.raises(RuntimeError, match="temporarily"):
        exit_cleanly(wrong)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    assert exit_cleanly(wrong) == 2
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_background_reports_that_a_thread_cannot_start(monkeypatch):
    def no_room(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Background()
