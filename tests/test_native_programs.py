"""Every program accepts native images: training, resuming, features, transfer, figures, exports and dry runs."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli import convert, draw
from m3ae_fast.cli import embed as features
from m3ae_fast.cli.evaluate import main as transfer
from m3ae_fast.config.evaluation import ImageConfig
from m3ae_fast.drawing.figures import box_in, shown
from m3ae_fast.evaluation import compare
from m3ae_fast.evaluation.model_images import set_images
from m3ae_fast.heads.modules import AttentiveHeads
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.weights.open_model import open_model
from tests.helpers.labelled import labelled_members, tiny_run
from tests.helpers.shards import write_tar
from tests.test_resume import SAVE, _cut

SIZES = ((32, 32), (64, 16), (24, 40), (16, 60), (120, 100), (8, 8))  # width and height
NATIVE = ["--set", "model.resize=native", "--set", "model.max_patches=20"]


def elongated_tar(path, numbers):
    """Write a shard of labelled images of several sizes."""
    files = []
    for name, content in labelled_members(numbers):
        if name.endswith("png"):
            out = BytesIO()
            Image.open(BytesIO(content)).resize(SIZES[int(name[:5]) % len(SIZES)]).save(out, "PNG")
            content = out.getvalue()
        files.append((name, content))
    return write_tar(path, files)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elongated")
    return elongated_tar(folder / "train.tar", range(36)), elongated_tar(folder / "val.tar", range(100, 112))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("run"), resize="native", max_patches=20)


@pytest.mark.slow
def test_a_native_run_is_the_same_if_resumed_and_on_two_ranks(trainer, shards):
    """The loss decreases, and reconstructions are plotted. The run reads the sizes of its images in advance, to
    distribute the images over ranks."""
    sizes = Path(f"{shards[0]}.sizes.index")
    sizes.unlink(missing_ok=True)
    data = [part for name, own in zip(("train", "val"), shards) for part in ("--set", f"data.{name}.0.shards={own}")]
    options = [*NATIVE, *data, *SAVE, "--set", "train.pictures=4"]
    trainer("run", *options)
    assert sizes.exists()
    whole = trainer.losses("run")
    assert whole[-1][2] < 0.9 * whole[0][2]  # the image loss
    assert "mfu" not in (trainer.folder / "run/metrics.jsonl").read_text()
    _cut(trainer, "run", 4)
    trainer("run", *options, "--resume", "auto")
    assert trainer.losses("run") == whole
    trainer("two", *options, "--set", "train.micro_batch=8", ranks=2)
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(whole), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["knn", "attentive", "finetune", "robustness"])
def test_evaluation_tasks_support_native_images(run, shards, tmp_path, task, capsys):
    def perform(task, model, *settings, out="out"):
        data = ["--val", shards[1], *(["--train", shards[0]] if task != "robustness" else [])]
        fixed = ["data.workers=0"] + ["encode.precision=fp32"] * (task in ("knn", "attentive"))
        overrides = [part for one in (*fixed, *settings) for part in ("--set", one)]
        assert transfer([task, str(model), *data, "--out", str(tmp_path / out), *overrides]) == 0
        return json.loads((tmp_path / out / "result.json").read_text())

    if task == "knn":
        native, square = perform(task, run), perform(task, run, "model.resize=square", out="square")
        assert native["val_samples"] == square["val_samples"] == 12
        return
    if task == "attentive":
        perform(task, run, "attentive.steps=2")
        return
    tune = ["train.steps=2", "train.global_batch=8", "optim.warmup_epochs=0", "train.precision=fp32"]
    if task == "finetune":
        with pytest.raises(
            UserError, match=r"can mix only images of one size, but model\.resize is native; set both to 0"
        ):
            perform(task, run, *tune, out="mixed")
    perform("finetune", run, *tune, "finetune.mixup=0", "finetune.cutmix=0", out="tuned")
    if task == "robustness":
        perform(task, tmp_path / "tuned", "robustness.epsilons=[1]", "robustness.steps=1")


def test_features_equal_those_of_encode_for_any_other_images_in_the_batch(run, shards, tmp_path):
    out = tmp_path / "out.npz"
    arguments = [str(run), shards[1], "--out", str(out), "--patches", "--set", "data.workers=0"]
    assert features.main([*arguments, "--set", "encode.precision=fp32"]) == 0
    found, model = np.load(out), open_model(str(run), text=False)
    images = [decode_image(dict(members)["png"], 3) for members in _samples(100, 112)]
    for number, image in enumerate(images):
        np.testing.assert_allclose(found["features"][number], model.encode(image, precision="fp32")[0], atol=1e-5)
        rows, columns = found["grids"][number]
        assert (rows, columns) == model.geometry.native.grid(*image.shape[1:])
        patches = found["patches"][number]
        assert patches.shape == (20, 32) and not patches[rows * columns :].any()
        np.testing.assert_allclose(
            patches[: rows * columns].astype(np.float32).mean(0), found["features"][number], atol=2e-3
        )
    out, square = tmp_path / "square.npz", open_model(str(run), text=False)
    arguments = [str(run), shards[1], "--out", str(out), "--set", "data.workers=0", "--set", "model.resize=square"]
    assert features.main([*arguments, "--set", "encode.precision=fp32"]) == 0
    set_images(square, ImageConfig(resize="square"))
    np.testing.assert_allclose(np.load(out)["features"], square.encode(images, precision="fp32"), atol=1e-5)
    with pytest.raises(ValueError, match="the image has 16 x 20 pixels, which are not multiples of"):
        model.encode(torch.zeros(3, 20, 16))
    assert model.encode(torch.zeros(3, 8, 48)).shape == (1, 32)


def test_models_are_compared_on_images_of_the_requested_shape(run, shards, tmp_path, monkeypatch):
    def encode(models, *_, **__):
        raise UserError(f"images are {models[0].config.resize}")  # everything else would take a long time

    monkeypatch.setattr(compare, "encode_types", encode)
    arguments = ["--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out"), "--set", "data.workers=0"]
    with pytest.raises(UserError, match="images are square"):
        transfer(["compare", str(run), *arguments, "--probes", "knn", "--set", "model.resize=square"])


def _samples(start, stop):
    files = {}
    for number in range(start, stop):
        out = BytesIO()
        content = dict(labelled_members([number]))[f"{number:05d}.png"]
        Image.open(BytesIO(content)).resize(SIZES[number % len(SIZES)]).save(out, "PNG")
        files[number] = [("png", out.getvalue())]
    return files.values()


@pytest.mark.slow
def test_figures_keep_the_aspect_ratio(run, shards, tmp_path):
    for number, (kind, *options) in enumerate((["reconstructions"], ["attention"], ["attention", "--patch", "1,3"])):
        out = tmp_path / f"{number}.png"
        arguments = [kind, str(run), *options, "--val", shards[1], "--pictures", "3", "--out", str(out)]
        assert draw.main(arguments) == 0 and Image.open(out).width > 200
    wide = torch.zeros(3, 8, 32, dtype=torch.uint8)
    assert box_in(wide, 128) == (0, 48, 128, 32)
    rows = np.flatnonzero(np.asarray(shown(wide, 128)).sum((1, 2)) == 0)
    assert (rows[0], rows[-1]) == (48, 79)
    with pytest.raises(UserError, match="from 0,0 to 9,9"):
        draw.main(["attention", str(run), "--val", shards[1], "--patch", "10,0"])


def test_exports_of_native_models_process_square_images_and_state_this(run, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    model = open_model(str(run), text=False)
    assert convert.main([str(run), "--out", str(tmp_path / "timm"), "--format", "timm"]) == 0
    assert "this format accepts only square images of 32 x 32 pixels" in capsys.readouterr().out
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    torch.testing.assert_close(
        vit((image / 255 - mean) / std).detach(), model.encode(image, precision="fp32"), rtol=0, atol=2e-5
    )
    assert convert.main([str(run), "--out", str(tmp_path / "own")]) == 0
    assert "images of any aspect ratio" in (tmp_path / "own/README.md").read_text()
    assert open_model(str(tmp_path / "own"), text=False).config.resize == "native"


def test_the_attentive_probe_ignores_padding_tokens():
    head = AttentiveHeads(8, 3, 2, [0]).eval()
    torch.nn.init.normal_(head.query)
    tokens = torch.randn(2, 5, 8)
    filled = torch.cat((tokens, torch.zeros(2, 3, 8)), 1)
    torch.testing.assert_close(head(filled), head(tokens))
