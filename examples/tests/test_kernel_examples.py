"""The example programs of the kernel library run unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.trainer import ROOT


def losses(example: str, *arguments: str) -> list[float]:
    """Return the losses that an example prints after the word "loss" or, for two models, after "fused" and after the
    name of the other model."""
    command = [sys.executable, str(ROOT / "kernels/examples" / example), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [float(x) for x in re.findall(r"(?:loss|Training|fused) ([\d.]+)", result.stdout)]


@pytest.mark.parametrize("example, steps", [("image_mae.py", "160"), ("masked_language_model.py", "60")])
def test_each_kernel_example_learns(example, steps):
    first, *_, last = losses(example, "--steps", steps)
    assert last < 0.4 * first


@pytest.mark.parametrize("example", ["hugging_face_vit_mae.py", "language_model_head.py", "timm_naflexvit.py"])
def test_patched_third_party_models_have_equal_losses(example):
    """The original model and the model with the ops have equal losses. The examples themselves compare gradients."""
    plain, fused = losses(example)
    assert fused == pytest.approx(plain, abs=2e-6)


def test_every_example_is_run_and_named_in_the_readme():
    examples = {path.name for path in (ROOT / "kernels/examples").glob("*.py")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in examples if f'"{name}"' in text} == examples
    readme = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert all(f"(examples/{name})" in readme for name in examples)
