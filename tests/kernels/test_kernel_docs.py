"""The README's example and the example file run as printed."""

import re
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def test_readme_example():
    code = re.search(r"```python\n(import torch.*?)```", (KERNELS / "README.md").read_text(), re.S).group(1)
    names: dict = {}
    exec(code, names)
    assert names["loss"].isfinite() and names["correct"].shape == (480,)


def test_image_mae_learns():
    command = [sys.executable, str(KERNELS / "examples/image_mae.py"), "--steps", "160"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert losses[-1] < 0.4 * losses[0]


def test_triton_is_not_needed_on_a_cpu():
    code = """
import sys
sys.modules["triton"] = None
import torch, m3ae_kernels
x = torch.randn(4, 8, requires_grad=True)
m3ae_kernels.gather_tokens(x, torch.tensor([1], dtype=torch.int32)).sum().backward()
assert x.grad.sum() == 8
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
