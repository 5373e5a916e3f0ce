"""The Triton kernels on Triton's interpreter: test_kernel_ops.py, test_kernel_api.py and test_kernel_shapes.py once
more, in a process of their own, and tiles.py in another.

Triton decides at its import whether it interprets; the rest of the suite must not be interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "triton", "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, "-m", *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    return result.stdout


def test_ops_on_the_interpreter():
    files = (str(HERE / f"test_kernel_{name}.py") for name in ("ops", "api", "shapes"))
    # compilers and transforms see the registration of the ops, which is the same for both implementations
    others = "not inductor and not compile_equals_eager and not func_grad and not transforms"
    out = run("pytest", "-p", "no:cacheprovider", "-k", others, *files)
    assert " passed" in out and "skipped" not in out


def test_shipped_tiles_on_the_interpreter():
    """The block sizes of an H100's table, which are other than the interpreter's own: tiles wider than the inputs."""
    out = run("pytest", "-p", "no:cacheprovider", str(HERE / "tiles.py"))
    assert " passed" in out and "skipped" not in out


def test_the_kernels_equal_the_official_model():
    out = run("m3ae_fast.verify", "tests/golden/paired.npz")
    assert "agree with the official implementation" in out
