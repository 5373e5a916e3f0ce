"""Benchmark of the time that training waits for a checkpoint of four ranks, and of the memory that each rank uses for
it."""

import json
import subprocess
import sys

from benchmarks import results

RANKS = 4
METHODS = "gathered: rank 0 gathers complete tensors; parts: each rank saves its partition"


def test_saving(tmp_path):
    out = tmp_path / "rows.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    subprocess.run([*launch, "-m", "benchmarks.saving", str(out)], check=True)
    rows = json.loads(out.read_text())
    results.write("saving", f"Saving a checkpoint of the small model on {RANKS} ranks with gloo ({METHODS})", rows)
    assert all(row["memory relative to the rank's partition"] <= 1.3 for row in rows)
    assert all(row["ratio of the delays"] >= 10 for row in rows)
