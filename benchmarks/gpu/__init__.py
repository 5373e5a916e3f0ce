"""`python -m benchmarks.gpu`: checks, tunes and times the kernels on this machine's GPU, with only torch, triton and
numpy installed; and times whole training steps."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("m3ae_kernels") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
