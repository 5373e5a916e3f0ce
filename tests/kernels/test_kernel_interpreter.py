"""The Triton kernels on Triton's interpreter: test_kernel_ops.py, the other files that run on both implementations,
tiles.py and program_order.py, in a separate process.

Triton decides at its import whether kernels are interpreted; the other tests must not be interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "triton", "OMP_NUM_THREADS": "1"}


def test_ops_pass_their_tests_on_the_triton_interpreter():
    files = [
        *(f"test_kernel_{name}.py" for name in ("ops", "hog", "api", "shapes", "ids")),
        "tiles.py",
        "program_order.py",
    ]
    # Compilers and transforms use only the registration of the ops, which is the same for both implementations.
    others = "not inductor and not compile_equals_eager and not func_grad and not transforms and not compiled_code"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", others]
    command += [str(HERE / file) for file in files]
    result = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.lower() and all(file in result.stdout for file in files)
