import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it at its import; each of pytest's workers has one core

# Tests send signals to their processes that would be ignored under nohup or in the background of a script.
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

# These files take a long time and therefore start first; otherwise a worker might run one of them alone at the end.
LONGEST = (
    "test_deepspeed_options.py",
    "kernels/test_kernel_interpreter.py",
    "test_elastic.py",
    "test_end_to_end.py",
    "test_pretrain.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_without_gpu(config, items)

    def order(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=order)
    if (seed := config.getoption("--shuffle")) is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def mlp_dtypes(monkeypatch: pytest.MonkeyPatch) -> set:
    """Return the dtypes that the op of the MLP supports. On CPUs without AVX-512, torch computes its GELU."""
    import torch
    from m3ae_kernels.cpu import build, mlp

    if not build.DTYPES:
        monkeypatch.setattr(mlp, "DTYPES", {torch.float32, torch.bfloat16})
        monkeypatch.setattr(mlp, "_library", lambda dtype: None)
    return mlp.DTYPES
