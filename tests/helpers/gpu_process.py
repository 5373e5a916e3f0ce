"""Tests that require a GPU: `@pytest.mark.gpu(seconds=S)`.

They are collected only if torch finds a GPU. Each one runs in a process of its own with a time limit. A test that
fails, dies or hangs therefore does not affect the others, even if it hangs in C code or makes the GPU unusable for its
process.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile

import pytest
import torch
from m3ae_kernels.tuning import limited_process

CHILD = "M3AE_GPU_TEST"  # set in the process that runs a single test
_left_out = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with the mark `gpu` in another process."""
    mark = pyfuncitem.get_closest_marker("gpu")
    if mark is None or CHILD in os.environ:
        return None
    node, seconds = f"{pyfuncitem.path}::{pyfuncitem.nodeid.partition('::')[2]}", mark.kwargs["seconds"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(pyfuncitem.config.rootpath),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        code = limited_process.run([*command, node], seconds, stdout=log, stderr=log, env=own | {CHILD: "1"})
        log.seek(0)
        output = log.read()
    if problem := limited_process.end_of(code, seconds):
        pytest.fail(f"the process of this test {problem}\n{output[-8000:]}", pytrace=False)
    if skipped := re.search(r"^SKIPPED \[1\] \S+: (.*)", output, re.MULTILINE):
        pytest.skip(skipped[1])
    return True


def deselect_without_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that require a GPU if there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=on_gpu)
        config.stash[_left_out] = len(on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_left_out, 0):
        terminalreporter.write_line(f"{count} tests did not run, because they need a GPU, and torch finds none")
