"""The example programs of the kernel library run as printed."""

import re
import subprocess
import sys

import pytest

from tests.helpers.trainer import ROOT


def losses(example: str, *arguments: str) -> list[float]:
    """Return what an example prints after the word "loss" or, of two models, after "fused" and the other's name."""
    command = [sys.executable, str(ROOT / "kernels/examples" / example), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [float(x) for x in re.findall(r"(?:loss|Training|fused) ([\d.]+)", result.stdout)]


@pytest.mark.parametrize("example, steps", [("image_mae.py", "160"), ("masked_language_model.py", "60")])
def test_example_learns(example, steps):
    first, *_, last = losses(example, "--steps", steps)
    assert last < 0.4 * first


def test_hugging_face_vit_mae_has_equal_losses():
    plain, fused = losses("hugging_face_vit_mae.py")
    assert fused == pytest.approx(plain, abs=2e-6)
