"""A GPU test that fails, dies or hangs does not affect other tests. The GPU and the tests that need it are
simulated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.trainer import ROOT

HOOKS = """
import torch
from tests.helpers.gpu_process import deselect_without_gpu, pytest_pyfunc_call, pytest_terminal_summary

def pytest_collection_modifyitems(config, items):
    deselect_without_gpu(config, items)

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")

torch.cuda.is_available = lambda: {gpu}
"""
TESTS = """
import ctypes, os, signal, sys
import pytest

@pytest.mark.gpu(seconds=100)
def test_passes():
    assert os.environ["M3AE_GPU_TEST"]

@pytest.mark.gpu(seconds=100)
def test_fails():
    assert 1 == 2, "a wrong result"

@pytest.mark.gpu(seconds=100)
def test_dies():
    os.abort()

@pytest.mark.gpu(seconds=4)
def test_hangs():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(100)  # in C code, with Python's lock

@pytest.mark.gpu(seconds=100)
def test_is_not_installed():
    pytest.skip("there is no such library")

def test_without_a_gpu():
    assert "M3AE_GPU_TEST" not in os.environ
"""


def run(folder: Path, gpu: bool) -> str:
    (folder / "conftest.py").write_text(HOOKS.replace("{gpu}", str(gpu)))
    (folder / "test_gpu.py").write_text(TESTS)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    own = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "COLUMNS": "300"}  # wide summary
    return subprocess.run(command, cwd=folder, env=environment | own, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_gpu_test_that_fails_dies_or_hangs_does_not_affect_the_others(tmp_path):
    out = run(tmp_path, gpu=True)
    assert re.search(r"^PASSED test_gpu.py::test_passes$", out, re.MULTILINE), out
    assert re.search(r"^PASSED test_gpu.py::test_without_a_gpu$", out, re.MULTILINE)
    assert "FAILED test_gpu.py::test_fails - Failed: the process of this test ended with exit code 1" in out
    assert "a wrong result" in out
    assert "FAILED test_gpu.py::test_dies - Failed: the process of this test was ended by SIGABRT" in out
    assert "FAILED test_gpu.py::test_hangs - Failed: the process of this test did not end within 4 s" in out
    assert "there is no such library" in out and "3 failed, 2 passed, 1 skipped" in out


@pytest.mark.slow
def test_gpu_tests_are_deselected_with_a_reason_if_there_is_no_gpu(tmp_path):
    out = run(tmp_path, gpu=False)
    assert "5 tests did not run, because they need a GPU, and torch finds none" in out
    assert "1 passed, 5 deselected" in out
