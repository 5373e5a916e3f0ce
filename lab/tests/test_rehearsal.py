"""Every line of the CUDA path is executed without a GPU; see tests/rehearsal."""

import os
import subprocess
import sys

import pytest

from benchmarks import results
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT
from tests.rehearsal import first_hour, stand_in_python


def test_every_line_of_the_cuda_path_runs_or_is_explained():
    command = [sys.executable, "-m", "tests.rehearsal", "-p", "no:cacheprovider"]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, cwd=ROOT, env=environment() | path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "lines of the CUDA path ran without a GPU" in done.stdout


@pytest.mark.slow
def test_a_killed_process_in_the_first_hour_loses_only_one_check(tmp_path):
    """The other stages are tested nightly by `python -m tests.rehearsal.first_hour`."""
    environment = os.environ | first_hour.stand_in(tmp_path) | {"FAULTS": "process"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [environment["STAND_IN_PYTHON"], "-m", "benchmarks.gpu", "--quick", "--dtype", "float16"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr
    rows = results.read(tmp_path / "gpu-checks.json")
    failed = {row["op"]: row["verdict"] for row in rows if row["verdict"] != "ok"}
    assert len(rows) == 11 and failed == {stand_in_python.DIES: "the process ended with SIGABRT"}
