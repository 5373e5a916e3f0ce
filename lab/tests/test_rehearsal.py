"""No line of the CUDA path stays unexecuted, where there is no GPU: see tests/rehearsal."""

import os
import subprocess
import sys

from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT


def test_every_line_of_the_cuda_path_runs_or_is_explained():
    command = [sys.executable, "-m", "tests.rehearsal", "-p", "no:cacheprovider"]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, cwd=ROOT, env=environment() | path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "lines of the CUDA path ran without a GPU" in done.stdout
