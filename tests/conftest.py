import itertools
import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; each of pytest's workers has one core

# Tests send signals to the processes that they start. Under nohup or in the background of a script, these processes
# would ignore the signals.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.helpers.gpu_process import (  # noqa: F401  # hooks
    deselect_without_gpu,
    pytest_pyfunc_call,
    pytest_terminal_summary,
)
from tests.helpers.trainer import Trainer

# These files take a long time, the longest first. Each worker begins with some of them; otherwise a worker might run
# one of them alone at the end.
LONGEST = (
    "kernels/test_kernel_interpreter.py",
    "soak/test_soak.py",
    "evaluation/test_ranks_of_tasks.py",
    "test_deepspeed_options.py",
    "test_elastic.py",
    "test_end_to_end.py",
    "test_engine_parity.py",
    "test_pretrain.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_without_gpu(config, items)
    items[:] = dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    if (seed := config.getoption("--shuffle")) is not None:
        random.Random(seed).shuffle(items)


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return the tests in an order in which each worker begins with some of the files in LONGEST. The scheduler of
    conftest.py in the root folder first gives each worker an equal number of consecutive tests."""
    files: dict[str, list[pytest.Item]] = {file: [] for file in LONGEST}
    others = []
    for item in items:
        files.get(item.nodeid.partition("::")[0].removeprefix("tests/"), others).append(item)
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        first = list(itertools.chain.from_iterable(files[file] for file in LONGEST[worker::workers]))
        more = max(0, (len(items) - len(ordered)) // (workers - worker) - len(first))
        ordered += first + others[:more]
        del others[:more]
    return ordered + others


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def mlp_dtypes(monkeypatch: pytest.MonkeyPatch) -> set:
    """Return the dtypes that the op of the MLP supports. On CPUs without AVX-512, the op uses torch's GELU."""
    import torch
    from m3ae_kernels.cpu import build, mlp

    if not build.DTYPES:
        monkeypatch.setattr(mlp, "DTYPES", {torch.float32, torch.bfloat16})
        monkeypatch.setattr(mlp, "_library", lambda dtype: None)
    return mlp.DTYPES
