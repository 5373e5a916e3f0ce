"""Record the lines that each test executes, and the duration of each test: python -m lab.mutation.coverage_map
FILE.json TEST..."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Contexts:
    """A pytest plugin that tells `measured` which test is running; fixtures count as part of the test that uses
    them."""

    def __init__(self, measured) -> None:
        self.measured, self.seconds = measured, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if "trainer" not in item.fixturenames:  # coverage in its child processes is not recorded
            self.measured.switch_context(item.nodeid)
        start = sum(os.times()[:4])  # CPU time of this process and of its ended children
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - start
        self.measured.switch_context("")
        return result


def main(argv: list[str]) -> int:
    out, *tests = argv
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import coverage

    sources = [str(ROOT / part) for part in ("m3ae_fast", "kernels/m3ae_kernels")]
    measured = coverage.Coverage(data_file=None, source=sources, messages=False)
    measured.start()
    contexts = Contexts(measured)
    failed = pytest.main([*tests, "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[contexts])
    measured.stop()
    found = defaultdict(dict)
    data = measured.get_data()
    for path in data.measured_files():
        for line, names in data.contexts_by_lineno(path).items():
            found[str(Path(path).relative_to(ROOT))][line] = sorted(set(names) - {""})
    Path(out).write_text(json.dumps({"seconds": contexts.seconds, "tests": found}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
