"""Runs under faults end bitwise identical to an undisturbed run.

While a tiny model is trained, its processes are killed, frozen, suspended or sent signals, its disk is full, its files
are damaged or deleted, and the server of its shards fails. Each run is restarted with `--resume auto` until it is
complete. Its losses, gradient norms and weights must then be bitwise identical to those of an undisturbed run, and no
process may hang or print a traceback.
"""

import random
from pathlib import Path

import pytest

from tests.soak.faults import DAMAGES, FAULTS, FREEZE, FULL_DISK
from tests.soak.runs import CLIPART, LAYOUTS, Soak
from tests.soak.server import faulty_server


def faults_of(layout: str) -> list[str]:
    """Return the faults that are injected into the runs of a layout, so that each occurs in exactly one layout. A
    single rank is not frozen, because no other rank could notice it."""
    everything = [fault for fault in (*FAULTS, *DAMAGES, FULL_DISK) if fault != FREEZE]
    random.Random(0).shuffle(everything)
    number = [*LAYOUTS].index(layout)
    return everything[number :: len(LAYOUTS)] + ([FREEZE] if layout == "2 ranks" else [])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_with_injected_faults_end_bitwise_identical_to_an_undisturbed_run(tmp_path: Path, layout: str):
    with faulty_server(CLIPART, seed=0) as server:
        soak = Soak(tmp_path, server.url, layout, faults_of(layout), seed=0)
        soak.run()
    if soak.wrong:
        pytest.fail("\n".join([*soak.wrong, f"after {soak.injected}"]))  # whole, because tracebacks are long
    assert not soak.faults  # each has been injected
