"""The image encoder as an ONNX file gives the features of `encode`, for any number of images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import m3ae_fast
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.convert import main as convert
from m3ae_fast.config import POOLINGS
from m3ae_fast.weights import onnx_model
from tests.helpers.trainer import ROOT
from tests.weights.test_timm import CASES as OF_TIMM
from tests.weights.test_timm import make

pytestmark = pytest.mark.slow


CASES = OF_TIMM | {  # images have 3 x 3 patches, so the cells of these grids contain parts of patches
    "grid2": {"pool": "grid2"},
    "grid4, a norm of the means": {"pool": "grid4", "mean_pool": "before_norm"},
}


def _features(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"pixels": pixels})[0])


DTYPES = {"MAE's": "float32", "grey": "uint16"}  # dtype of the pixels; in all other cases, it is uint8


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_model_computes_the_features_of_encode(tmp_path, name, capsys, caplog):
    model, _, _ = make(**CASES[name], image_dtype=DTYPES.get(name, "uint8"))
    model.save_pretrained(tmp_path / "model")
    assert convert([str(tmp_path / "model"), "--out", str(tmp_path / "encoder.onnx"), "--format", "onnx"]) == 0
    output, warned = capsys.readouterr()
    assert "WARNING" not in warned and not caplog.records
    dtype, shape = model.config.image_dtype, (5, model.config.channels, 24, 24)
    pixels = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype] * np.random.default_rng(1).random(shape, np.float32)
    given = torch.from_numpy(pixels.astype(dtype))
    pixels = given.numpy().astype("int32" if dtype == "uint16" else dtype)
    for count in (1, 5):
        expected = model.encode(given[:count], value_range=(0, 1) if dtype == "float32" else None, precision="fp32")
        found = _features(tmp_path / "encoder.onnx", pixels[:count])
        assert found.shape == expected.shape
        assert torch.cosine_similarity(found, expected).min().item() > 0.99999
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert f"written to {tmp_path}/encoder.onnx\n" in output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "encoder.onnx"}


def test_a_pooling_that_neither_timm_nor_a_grid_has_is_refused(tmp_path, monkeypatch):
    """If it were not refused, the file would compute the mean instead."""
    monkeypatch.setitem(POOLINGS, "cls", POOLINGS["cls"]._replace(timm=None))
    model, _, _ = make(pool="cls")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="pool cls: cannot be exported as ONNX; choose one of mean, grid2, grid4"):
        m3ae_fast.convert(tmp_path / "model", tmp_path / "encoder.onnx", format="onnx")
    assert not (tmp_path / "encoder.onnx").exists()


@pytest.mark.parametrize("name", ["a.onnx.bak", "a", "a.onnxx"])
def test_a_file_without_the_suffix_onnx_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: must end in .onnx"):
        onnx_model.write_onnx(tmp_path / name, None, {})


def test_the_example_needs_no_torch(tmp_path):
    model, _, _ = make()
    onnx_model.write_onnx(tmp_path / "encoder.onnx", model.config, model.state_dict())
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (30, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    code = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    example = str(ROOT / "examples/onnx_features.py")
    command = [sys.executable, "-c", code, example, "encoder.onnx", "0.png", "1.png"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(Path(example).read_text().splitlines()) <= 30
    first, second = model.encode([tmp_path / f"{number}.png" for number in range(2)], precision="fp32")
    similarity = float(out.split()[-1])
    assert similarity == pytest.approx(torch.cosine_similarity(first, second, dim=0).item(), abs=2e-3)


def test_user_errors_are_reported_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    model, _, _ = make()
    with pytest.raises(UserError, match=r"encoder: must end in .onnx"):
        onnx_model.write_onnx(tmp_path / "encoder", model.config, model.state_dict())
    for name in ("onnx", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"format onnx needs onnx and timm: pip install 'm3ae-fast\[onnx\]'"):
        onnx_model.write_onnx(tmp_path / "a.onnx", model.config, model.state_dict())
    assert not list(tmp_path.iterdir())
