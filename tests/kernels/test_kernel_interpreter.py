"""The Triton kernels on Triton's interpreter: test_kernel_ops.py once more, in a process of its own.

Triton decides at its import whether it interprets; the rest of the suite must not be interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_ops_on_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "triton", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name("test_kernel_ops.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
