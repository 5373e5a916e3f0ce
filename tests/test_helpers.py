"""Helpers on which tests rely when something fails."""

import os
import threading
import time

import pytest

from tests.helpers import ranks


def main(arguments):
    """Run a program with one rank that never ends."""
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
