"""`python -m benchmarks.gpu`: the kernels on this machine's GPU, checked, tuned and timed, with torch, triton and numpy
alone; and whole training steps."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("m3ae_kernels") is None:  # a bare checkout, not installed
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
