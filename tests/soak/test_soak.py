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

# Faults that affect the other ranks, or a checkpoint that is divided among ranks. All other faults are injected into
# runs of one rank, because these start fastest.
OF_SEVERAL_RANKS = {
    "2 ranks": [FREEZE, "a rank is killed", "a rank gets SIGTERM", "the launcher is killed"],
    "2 ranks with ZeRO-3": ["all processes get SIGINT", "the launcher gets SIGTERM", "the last checkpoint is damaged"],
}


def faults_of(layout: str) -> list[str]:
    """Return the faults that are injected into the runs of a layout. Each fault occurs in one layout. The order is
    random, except that damage to files is at the front of the list. The first fault of the list that is possible is
    injected, and damage is possible only after another fault has left files behind."""
    elsewhere = [fault for faults in OF_SEVERAL_RANKS.values() for fault in faults]
    others = [fault for fault in (*FAULTS, *DAMAGES, FULL_DISK) if fault not in elsewhere]
    faults = OF_SEVERAL_RANKS.get(layout, others)
    return sorted(random.Random(0).sample(faults, len(faults)), key=lambda fault: fault not in DAMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_with_injected_faults_end_bitwise_identical_to_an_undisturbed_run(tmp_path: Path, layout: str):
    with faulty_server(CLIPART, seed=0) as server:
        soak = Soak(tmp_path, server.url, layout, faults_of(layout), seed=0)
        soak.run()
    if soak.wrong:
        # pytest.fail prints the whole text, but an assertion would shorten it
        pytest.fail("\n".join([*soak.wrong, f"after {soak.injected}"]))
    assert not soak.faults, "each fault must have been injected"
