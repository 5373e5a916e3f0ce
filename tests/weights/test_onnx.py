"""The image encoder as an ONNX file gives the features of `encode`, for any number of images."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.evaluate import main as transfer
from m3ae_fast.cli.export import main as export
from m3ae_fast.evaluation import onnx_check
from m3ae_fast.weights import onnx_model
from tests.helpers.labelled import labelled_tar
from tests.helpers.trainer import ROOT
from tests.weights.test_timm import CASES, make

pytestmark = pytest.mark.slow

SPLITS = {"train": range(30), "val": range(30, 42)}


def _features(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"pixels": pixels})[0])


DTYPES = {"MAE's": "float32", "grey": "uint16"}  # of the pixels; all others are uint8


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_model_computes_the_features_of_encode(tmp_path, name, capsys, caplog):
    model, _, _ = make(**CASES[name], image_dtype=DTYPES.get(name, "uint8"))
    model.save_pretrained(tmp_path / "model")
    assert export([str(tmp_path / "model"), "--out", str(tmp_path / "encoder.onnx"), "--format", "onnx"]) == 0
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
        small = _features(tmp_path / "encoder.int8.onnx", pixels[:count])
        assert 0.98 < torch.cosine_similarity(small, expected).min().item() < 0.9999999
    assert (
        f"{tmp_path}/encoder.onnx: cosine similarity with torch 1.0000" in output
        and "encoder.int8.onnx: cosine" in output
    )
    assert "images/s on this machine" in output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "encoder.onnx", "encoder.int8.onnx"}


def test_the_accuracy_of_an_onnx_model_is_printed_with_that_of_torch(tmp_path, capsys):
    """Even random weights distinguish the colours. The accuracy is that of k-NN on the features of `encode`."""
    model, _, _ = make()
    model.save_pretrained(tmp_path / "model")
    shards = [labelled_tar(tmp_path / f"{name}.tar", numbers) for name, numbers in SPLITS.items()]
    command = [str(tmp_path / "model"), "--out", str(tmp_path / "a.onnx"), "--format", "onnx", "--train", shards[0]]
    assert export([*command, "--val", shards[1]]) == 0
    output = capsys.readouterr().out.partition("k-NN on 12 images of 3 classes, with neighbours from 30 images")[2]
    arguments = ["knn", str(tmp_path / "model"), "--train", shards[0], "--val", shards[1], "--modality", "image"]
    assert transfer([*arguments, "--out", str(tmp_path / "knn"), "--set", "encode.precision=fp32"]) == 0
    exact = json.loads((tmp_path / "knn/result.json").read_text())
    accuracy = f"k-NN {exact['top1']:.1%} ± {exact['top1_se']:.1%}"
    assert exact["top1"] > 0.5
    assert f"torch: {accuracy}, " in output and f"a.onnx: {accuracy}, +0.0 points relative to torch, " in output
    small = re.search(r"a.int8.onnx: k-NN ([\d.]+)% ± [\d.]+%, ([+-][\d.]+) points relative to torch, .* im", output)
    assert float(small[1]) == pytest.approx(100 * exact["top1"] + float(small[2]), abs=0.11)
    lost = [*command, "--val", "no.tar", "--out", str(tmp_path / "b.onnx")]
    assert exit_cleanly(lambda: export(lost)) == 2
    assert "no.tar" in capsys.readouterr().err and not (tmp_path / "b.onnx").exists()
    for wrong in (command, [*command, "--val", shards[1], "--format", "timm"]):
        with pytest.raises(UserError, match="--train and --val can be used only together, and only with --format onnx"):
            export(wrong)


@pytest.mark.parametrize("name", ["a.onnx.bak", "a", "a.onnxx"])
def test_a_file_without_the_suffix_onnx_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: must end in .onnx"):
        onnx_model.write_onnx(tmp_path / name, None, {})


def test_samples_to_classify_use_the_class_ids_of_the_training_samples(tmp_path):
    """The samples to classify lack some classes."""
    train, val = labelled_tar(tmp_path / "a.tar", range(6)), labelled_tar(tmp_path / "b.tar", [1, 2, 4, 5])
    found = onnx_check.open_labelled([train], [val], "json.name")
    ids = [part.sources[0].labels.tolist() for part in (found.train, found.val)]
    assert (found.classes, ids) == (3, [[0, 1, 2, 0, 1, 2], [1, 2, 1, 2]])


def test_the_accuracy_loss_and_speed_of_a_file_are_reported(tmp_path, monkeypatch):
    """The features are uninformative, and the simulated clock advances by a second at each reading."""
    model, _, _ = make()
    images = onnx_check.open_labelled(*([labelled_tar(tmp_path / f"{n}.tar", r)] for n, r in SPLITS.items()), "cls")
    draw = np.random.default_rng(0).standard_normal
    monkeypatch.setattr(
        onnx_check, "_runs", lambda path: lambda pixels: torch.from_numpy(draw((len(pixels), 8))).float()
    )
    monkeypatch.setattr(onnx_check, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    _, exact, lost = onnx_check.check_onnx([Path("a.onnx")], model.config, model.state_dict(), images).lines()
    right = [float(re.search(r"k-NN ([\d.]+)%", line)[1]) for line in (exact, lost)]
    assert right[1] < right[0] and f", {right[1] - right[0]:.1f} points relative to torch" in lost
    assert all(line.endswith(", 12 images/s on this machine") for line in (exact, lost))


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


def test_an_onnx_model_that_is_wrong_for_single_images_is_not_written(tmp_path, monkeypatch):
    model, _, _ = make()
    encoder = onnx_model.ImageEncoder(model.config, model.state_dict()).eval()

    class Session:
        def run(self, _, inputs):
            features = encoder(torch.from_numpy(inputs["pixels"])).numpy()
            return [features if len(features) > 1 else features[:, ::-1].copy()]

    monkeypatch.setattr(torch.onnx, "export", lambda encoder, inputs, path, **_: Path(path).touch())
    monkeypatch.setattr(onnx_model, "session", lambda path: Session())
    with pytest.raises(UserError, match="its features differ from torch's"):
        onnx_model.write_onnx(tmp_path / "a.onnx", model.config, model.state_dict())
    assert not list(tmp_path.iterdir())


def test_user_errors_are_reported_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    model, _, _ = make()
    with pytest.raises(UserError, match=r"encoder: must end in .onnx"):
        onnx_model.write_onnx(tmp_path / "encoder", model.config, model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(onnx_model, "NEEDED", 1.1)
        with pytest.raises(UserError, match="its features differ from torch's"):
            onnx_model.write_onnx(tmp_path / "a.onnx", model.config, model.state_dict())
    for name in ("onnx", "onnxruntime", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"--format onnx needs onnx, onnxruntime and timm: pip install 'm3ae-fast\[onnx\]'"
    ):
        onnx_model.write_onnx(tmp_path / "a.onnx", model.config, model.state_dict())
    assert not list(tmp_path.iterdir())
