"""Scheduling of `pytest -n`, for the tests of all folders."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler with which a worker that has run out of tests takes over tests of another worker.

    The default scheduler sends tests in batches of equal numbers, and one batch may take minutes longer than another.
    The option `--dist worksteal` in pyproject.toml would do the same, but pytest-benchmark measures nothing if it is
    set.
    """
    if config.getoption("dist") != "load":
        return None  # another scheduler was requested

    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
