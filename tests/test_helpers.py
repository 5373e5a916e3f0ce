"""Helpers on which tests rely when something fails."""

import ast
import os
import threading
import time
from concurrent.futures import TimeoutError
from pathlib import Path

import pytest

from tests.helpers import ranks, threads
from tests.helpers.threads import map_threads


def main(arguments):
    """Run a program of which one rank never ends."""
    if os.environ["RANK"] == "1":
        wait_here()
    return 0


def wait_here():
    print("waiting", flush=True)
    threading.Event().wait()


@pytest.mark.slow
def test_the_stack_trace_of_a_hanging_rank_is_shown(tmp_path, monkeypatch):
    log = tmp_path / "log"
    processes = ranks.fork_ranks(__name__, [], 2, log)
    processes[0].join(100)
    while not log.exists() or "waiting" not in log.read_text():
        time.sleep(0.05)
    monkeypatch.setattr(ranks, "LIMIT_S", 0.5)
    with pytest.raises(AssertionError, match="1 of 2 ranks are still at work") as caught:
        ranks.await_ranks(processes, log)
    assert "in wait_here" in str(caught.value) and "in main" in str(caught.value)


def test_no_test_starts_a_thread_that_could_keep_pytest_from_exiting():
    """Python waits for all threads except daemons before it exits. `helpers/threads.py` starts daemons."""
    root = Path(__file__).parents[1]
    files = [
        path for part in ("tests", "lab", "examples", "benchmarks") for path in sorted(root.glob(f"{part}/**/*.py"))
    ]
    endless = [
        f"{path.relative_to(root)}:{call.lineno}"
        for path in files
        if "threading.Thread(" in (text := path.read_text())
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "threading.Thread"
        if "daemon" not in [given.arg for given in call.keywords]
    ]
    assert not endless


def test_threads_of_tests_return_results_and_errors_and_do_not_wait_for_ever(monkeypatch):
    assert map_threads(lambda a, b: a + b, [1, 2], [10, 20]) == [11, 22]
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda number: 1 / number, [1, 0])
    monkeypatch.setattr(threads, "LIMIT_S", 0.05)
    with pytest.raises(TimeoutError):
        map_threads(lambda number: threading.Event().wait(), [1])
