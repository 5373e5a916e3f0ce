"""The CUDA path of the engine, the training program and the kernels' launchers, on a machine without a GPU.

The tests in tests/cuda_path run with a simulated GPU whose tensors are on the CPU (see fake_cuda.py). On a machine
without a GPU, no other tests execute the code for GPUs: copies on a separate stream, checks of values that the GPU
computed some steps ago, and code that depends on the kind of GPU. The tests run in a separate process, because Triton
and DeepSpeed read environment variables when they are imported."""

import os
import subprocess
import sys

import pytest

from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT

pytestmark = pytest.mark.slow
# Kernels run in few tests, because Triton's interpreter is slow, and wrong in bf16 (triton-lang/triton#11584).
OWN = {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "torch", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("part", ["engine", "kernels", "training"])
def test_the_cuda_path_runs_with_a_simulated_gpu(part):
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/cuda_path/path_{part}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | path | OWN, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
