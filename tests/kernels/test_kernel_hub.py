"""The layout for the Hugging Face hub, loaded as by the `kernels` package: from a path, under a unique name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from m3ae_kernels.hub import main

LOAD = """
import importlib.util, json, sys
from pathlib import Path

def load(variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    file = variant / metadata["name"].replace("-", "_") / "__init__.py"
    spec = importlib.util.spec_from_file_location(metadata["id"], file)
    module = sys.modules[metadata["id"]] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

copy = load(Path(sys.argv[1]))
"""
ALONE = """
import torch
assert not any(name.split(".")[0] == "m3ae_kernels" for name in sys.modules), "the installed package was used"
assert sys.argv[1] in copy.token_loss.__file__
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
targets = torch.arange(6)
loss = torch.compile(copy.masked_token_loss, backend="aot_eager", fullgraph=True)
loss(hidden, weight, targets, reduction="sum").backward()
expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0])
head = copy.MaskedPixelLoss(8, patch_size=4, mean=(0.5,), std=(0.5,), channels=1, reduction="sum")
images = torch.zeros(1, 1, 8, 12, dtype=torch.uint8)
head(hidden, images, targets).backward()
qkv = torch.randn(6, 3, 2, 16, requires_grad=True)
copy.packed_attention(qkv, torch.tensor([0, 2, 6]), 4).sum().backward()
print("loaded", copy.__version__)
"""
BESIDE = """
import m3ae_kernels, torch
from torch._subclasses.fake_tensor import FakeTensorMode
assert m3ae_kernels is not copy
for package in (copy, m3ae_kernels):  # registered ops of both, whichever came last
    with FakeTensorMode():
        x = torch.empty(5, 4, requires_grad=True)
        assert package.gather_tokens(x, torch.zeros(3, dtype=torch.int64)).shape == (3, 4)
assert copy.registry.NAMESPACE != m3ae_kernels.registry.NAMESPACE == "m3ae"
print("both")
"""


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    assert main([str(folder)]) == 0
    return folder / "build" / "torch-universal"


def run(variant: Path, code: str) -> str:
    result = subprocess.run([sys.executable, "-B", "-c", LOAD + code, str(variant)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_hub_variant_can_be_loaded_from_its_path(variant):
    assert "loaded" in run(variant, ALONE)


@pytest.mark.slow
def test_the_hub_variant_can_be_used_alongside_the_installed_package(variant):
    assert "both" in run(variant, BESIDE)


def test_metadata_of_the_hub_variant_matches_its_files(variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "m3ae-kernels" and metadata["id"].isidentifier()
    files = {path.name for path in (variant / "m3ae_kernels").rglob("*")}
    assert {"__init__.py", "attention.c", "sm_90.json", "token_loss.py"} <= files and "__pycache__" not in files


def test_the_id_of_the_hub_variant_depends_on_its_content(tmp_path, variant):
    from m3ae_kernels import hub

    package = variant / "m3ae_kernels"
    before = hub._digest(package)
    assert metadata_id(variant).endswith(before)
    (package / "new.py").write_text("")
    try:
        assert hub._digest(package) != before
    finally:
        (package / "new.py").unlink()


def metadata_id(variant: Path) -> str:
    return json.loads((variant / "metadata.json").read_text())["id"]


def test_an_existing_hub_variant_is_not_overwritten(variant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(variant.parents[1])])
    assert stopped.value.code == 2
    assert "cannot be written: File exists" in capsys.readouterr().err.splitlines()[-1]
