import os

import pytest

from benchmarks.alone import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before torch is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="height and width of the images; default: those of the shipped configs (256)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if size := config.getoption("--image-size"):
        from benchmarks import workload

        workload.IMAGE_SIZE = size  # before the benchmarks import it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables. During the tests, pytest would not show them."""
    from benchmarks import results

    for path, table in results.WRITTEN:
        terminalreporter.write_line(f"\n{table}written to {path}")
