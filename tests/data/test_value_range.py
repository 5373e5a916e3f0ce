"""The setting `value_range` maps values of more than 8 bits to levels. Every program that decodes images for a model
uses it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli import embed as features
from m3ae_fast.cli.convert import main as convert
from m3ae_fast.cli.evaluate import main as transfer
from m3ae_fast.cli.shards import main as data_tools
from m3ae_fast.config import Config, load_config, parse
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_start
from tests.helpers.checkpoints import changes_of
from tests.helpers.image_formats import pillow, png
from tests.helpers.labelled import tiny_run
from tests.helpers.shards import write_tar
from tests.helpers.trainer import TINY

LOW, HIGH = 600, 855  # the level is value - LOW


@pytest.fixture(scope="module")
def levels():
    """Return the levels of a few images, uint8 [32, 32] each."""
    return np.random.RandomState(0).randint(0, 256, (8, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, levels):
    """Write shards with the same images of two classes in 16 bits and in 8 bits."""
    folder = tmp_path_factory.mktemp("shards")

    def write(name, bits, offset):
        files = [(f"{i}.png", png(level.astype(int) + offset, bits, 0)) for i, level in enumerate(levels)]
        classes = [(f"{i}.cls", str(i % 2).encode()) for i in range(len(levels))]
        return write_tar(folder / name, sorted(files + classes))

    return write("deep.tar", 16, LOW), write("flat.tar", 8, 0)


def config(**sections) -> Config:
    return parse(Config, {**TINY, **{name: {**TINY[name], **given} for name, given in sections.items()}}, "test")


def test_the_value_range_is_stored_in_the_model():
    assert config(model={"value_range": [LOW, HIGH]}).model.value_range == (LOW, HIGH)
    remembered = config(model={"value_range": "dtype"})
    assert M3AE(remembered.model, remembered.loss).geometry.value_range == "dtype"
    assert parse(Config, remembered.model_dump(mode="json"), "again") == remembered
    assert config().model.value_range is None
    for wrong, message in (
        ({"model": {"value_range": [9, 3]}}, r"must be the values of black and of white, with black below white"),
        ({"model": {"value_range": [3, 3]}}, r"model: value_range \[3.0, 3.0\] must be"),
        ({"model": {"value_range": "float"}}, "model.value_range"),
    ):
        with pytest.raises(UserError, match=message):
            config(**wrong)


def test_a_value_range_can_be_set_in_a_shipped_config():
    assert load_config("configs/quickstart.json", ["model.value_range=[0,4095]"]).model.value_range == (0, 4095)


def test_resuming_with_another_value_range_is_refused(tmp_path):
    """A resumed run, and a run that starts from weights, must decode images as before."""
    before, now = config(model={"value_range": [0, 4095]}), config(model={"value_range": [0, 65535]})
    info = checkpoint.Info(1, 16, 0, before.model_dump(mode="json"), checkpoint.versions())
    assert changes_of(tmp_path, info, before, {}) == []
    with pytest.raises(UserError, match=r"model.value_range = \[0.0, 4095.0\], but the config has \[0.0, 65535.0\]"):
        changes_of(tmp_path, info, now, {})
    with pytest.raises(UserError, match=r"model.value_range = \(0.0, 4095.0\), but the config has \(0.0, 65535.0\)"):
        check_start(now.model, Pretrained(before.model, {}), "there")
    check_start(now.model, Pretrained(config().model, {}), "there")  # a model of 8-bit images accepts any range


def test_exports_and_encode_use_the_value_range(tmp_path, levels):
    run = tiny_run(tmp_path / "run", value_range=[LOW, HIGH])
    assert convert([str(run), "--out", str(tmp_path / "out")]) == 0
    model = M3AE.from_pretrained(tmp_path / "out")
    assert model.config.value_range == (LOW, HIGH)
    deep = [Image.open(io.BytesIO(png(level.astype(int) + LOW, 16, 0))) for level in levels]
    flat = [Image.fromarray(level) for level in levels]
    assert torch.equal(model.encode(deep), model.encode(flat))
    model.config = model.config.model_copy(update={"value_range": None})
    with pytest.raises(ValueError, match=r"cannot be used: the image has unsigned 16-bit values: pass value_range="):
        model.encode(deep)


@pytest.mark.slow
@pytest.mark.parametrize("remembered", [True, False])
def test_features_and_evaluations_use_the_value_range(tmp_path, shards, remembered):
    run = str(tiny_run(tmp_path / "run", value_range=[LOW, HIGH] if remembered else None))
    overrides = ["--set", "data.workers=0"] + ([] if remembered else ["--set", f"model.value_range=[{LOW},{HIGH}]"])
    found = []
    for number, shard in enumerate(shards):
        out = tmp_path / f"{number}.npz"
        assert features.main([run, shard, "--out", str(out), *overrides]) == 0
        found.append(np.load(out)["features"])
        task = ["knn", run, "--train", shard, "--val", shard, "--out", str(tmp_path / f"knn{number}"), *overrides]
        assert transfer([*task, "--set", "knn.k=2"]) == 0
    assert len(found[0]) == 8 and np.array_equal(*found)
    if not remembered:
        with pytest.raises(UserError, match=r"8 of 8 samples cannot be used.*set model\.value_range"):
            features.main([run, shards[0], "--out", str(tmp_path / "none.npz"), "--set", "data.workers=0"])


def test_shards_can_be_made_with_a_value_range(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    values = np.linspace(LOW, HIGH, 32 * 32).reshape(32, 32).astype(np.uint16)
    (tmp_path / "in" / "a.tif").write_bytes(pillow(values, "TIFF"))
    command = ["make", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(UserError, match=r"no sample can be used; the first error is: .*set model\.value_range"):
        data_tools(command)
    assert data_tools([*command, "--value-range", f"{LOW},{HIGH}"]) == 0
    data = next((tmp_path / "out").glob("*.tar")).read_bytes()
    image = decode_image(data[data.index(b"\xff\xd8") :], 1)
    assert (image[0].float() - torch.from_numpy(values.astype(np.float32) - LOW)).abs().mean() < 2
    capsys.readouterr()
