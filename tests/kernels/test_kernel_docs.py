"""The README's examples run as printed, and the library can be installed separately."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import m3ae_kernels
import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
BLOCKS = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(encoding="utf-8"), re.S)


def test_examples_in_the_readme_run():
    assert len(BLOCKS) == 8
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["y"].shape == (196, 384) and names["out"].shape == (10, 6, 64)
    assert names["loss"].isfinite() and names["correct"].shape == (120,)


def test_the_readme_names_the_versions_that_pip_asks_for():
    required, readme = ((KERNELS / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "README.md"))
    oldest = dict(re.findall(r"(torch|triton)>=([\d.]+\d)", required))
    assert dict(re.findall(r"(torch|triton) >= ([\d.]+\d)", readme)) == oldest and len(oldest) == 2


def test_the_tests_that_the_page_for_developers_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (KERNELS / "DEVELOPMENT.md").read_text(encoding="utf-8")))
    there = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) >= 12
    assert [name for name in named if f"def {name}(" not in there] == []


def test_the_kernels_are_a_separate_distribution(tmp_path):
    """`pip install ./kernels` installs only m3ae-kernels: the package, its tuning tables, and three requirements."""
    source = tmp_path / "kernels"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wheel = zipfile.ZipFile(next(source.glob("*.whl")))
    names = wheel.namelist()
    metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert f"Name: m3ae-kernels\nVersion: {m3ae_kernels.__version__}\n" in metadata
    assert sorted(re.findall(r"^Requires-Dist: ([a-z]+)", metadata, re.M)) == ["numpy", "torch", "triton"]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"m3ae_kernels"}
    own = {str(path.relative_to(KERNELS)) for path in (KERNELS / "m3ae_kernels").rglob("*.[pj]*") if path.is_file()}
    assert {name for name in own if "__pycache__" not in name} <= set(names)


@pytest.mark.slow
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
