"""Models that predict histograms of oriented gradients (`model.image_targets: hog`)."""

import json
import shutil

import numpy as np
import pytest
import torch
from m3ae_kernels import reference
from PIL import Image, ImageDraw

import m3ae_fast
from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.convert import main as convert
from m3ae_fast.config import Config, LossConfig, parse
from m3ae_fast.drawing.gradient_glyphs import glyphs
from m3ae_fast.drawing.reconstructions import GAP, SIDE, draw_reconstructions
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.image_targets import image_targets
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.training.user_warnings import open_options
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import TINY as RUN
from tests.helpers.trainer import zero
from tests.test_model import MIXED, TINY, make_model, make_sample

HOG = TINY.model_copy(update={"image_targets": "hog"})


def targets_of(sample: Sample) -> torch.Tensor:
    """Return the targets of all patches of a sample, [L, 9] float64."""
    ids = torch.arange(HOG.patches_per_image)
    return reference.hog_targets(sample.image[None], ids, patch_size=HOG.patch_size, dtype=torch.float64)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_image_loss_is_the_squared_error_of_the_histograms(per, everywhere):
    """With per="sample", the loss is averaged over the patches of each image and then over the images; with
    per="batch", over the patches of all images at once."""
    model = make_model(HOG, per=per, image_all_tokens=everywhere)
    with_image = [sample for sample in MIXED if sample.image is not None]
    losses = []
    for sample in with_image:
        predicted_IK, _ = model.predict(pack([sample], model.geometry))
        chosen = torch.ones_like(sample.image_mask) if everywhere else sample.image_mask
        losses.append((predicted_IK - targets_of(sample)[chosen]).square().mean(1))
    expected = torch.cat(losses).mean() if per == "batch" else torch.stack([each.mean() for each in losses]).mean()
    found = model(pack(MIXED, model.geometry))
    torch.testing.assert_close(found.image_loss.double(), expected, rtol=1e-5, atol=0)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.image_head.weight.shape == (9, 16) and model.image_head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32], ids=str)
def test_images_of_every_dtype_have_the_same_loss(dtype):
    """Floating-point images are normalised before they are packed."""
    levels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) % 4 != 0
    if dtype == torch.uint16:
        other = (levels.int() * 257).to(dtype)
    else:
        other = normalised(levels, HOG.image_mean, HOG.image_std)
    losses = []
    for image, name in ((levels, "uint8"), (other, str(dtype).removeprefix("torch."))):
        model = make_model(HOG.model_copy(update={"image_dtype": name}))
        losses.append(model(pack([Sample("a", image, mask)], model.geometry)).image_loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["pixels", "hog", "vqgan"])
def test_heads_have_the_number_of_outputs_of_the_config(kind):
    config = TINY.model_copy(update={"image_targets": kind})
    assert len(image_targets(config, LossConfig()).head().weight) == config.image_output_dim


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"norm_pix": True}}, r"loss\.norm_pix standardises pixels, but .* hog: set loss\.norm_pix to false"),
        ({"model": {"resize": "native"}}, "image_targets hog needs resize square, because native images are stored as"),
    ],
)
def test_settings_that_hog_cannot_be_combined_with_are_refused(sections, message):
    data = {name: RUN[name] for name in ("model", "data", "train")} | sections
    data["model"] = RUN["model"] | {"image_targets": "hog"} | sections.get("model", {})
    with pytest.raises(UserError, match=message):
        parse(Config, data, "config")


def test_hog_targets_are_reported_as_open_because_the_official_code_has_no_counterpart():
    data = {name: RUN[name] for name in ("data", "train")} | {"model": RUN["model"] | {"image_targets": "hog"}}
    assert open_options(parse(Config, data, "config")).startswith("Open: model.image_targets=hog; ")


def columns(path) -> list[np.ndarray]:
    """Return the four images of the first row of a figure."""
    sheet = np.asarray(Image.open(path).convert("L")).astype(int)
    return [sheet[24 : 24 + SIDE, GAP + i * (SIDE + GAP) : (i + 1) * (SIDE + GAP)] for i in range(4)]


@pytest.mark.parametrize("everywhere", [False, True])
def test_figures_show_the_true_and_the_predicted_gradients(tmp_path, monkeypatch, everywhere):
    """Visible patches show their true gradients. If the true gradients are predicted, both pictures are equal."""
    model, sample, written = make_model(HOG, image_all_tokens=everywhere), make_sample(0), []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, *args, **style: written.append(args[1]) or write(draw, *args, **style)
    )
    draw_reconstructions(model, [sample], None, tmp_path / "a.png")
    assert [title for title in written if "gradients" in title] == ["gradients", "predicted gradients"]
    _, _, true, predicted = columns(tmp_path / "a.png")
    cells = [each[:160, :160].reshape(4, 40, 4, 40).swapaxes(1, 2).reshape(16, -1) for each in (true, predicted)]
    assert true.std() > 5
    assert ((cells[0] != cells[1]).any(1) == sample.image_mask.numpy()).all()
    exact = targets_of(sample).float()
    chosen = slice(None) if everywhere else sample.image_mask
    monkeypatch.setattr(model, "predict", lambda batch: (exact[chosen], None))
    draw_reconstructions(model, [sample], None, tmp_path / "b.png")
    _, _, true, predicted = columns(tmp_path / "b.png")
    assert (true == predicted).all()


def test_a_line_runs_along_an_edge():
    """Left of the centre, the gradient is horizontal, so the edge is vertical."""
    targets = torch.full((2, 9), -0.06 / 0.07)
    targets[0, 0] = (0.2 - 0.06) / 0.07
    picture = np.asarray(glyphs(targets, (1, 2), 40))
    lit_y, lit_x = (picture > 60).nonzero()
    assert picture.shape == (40, 80) and np.ptp(lit_y) > 30 and np.ptp(lit_x) < 6 and abs(lit_x.mean() - 20) < 3


def test_an_export_predicts_gradients_and_its_encoder_is_exported_to_timm(tmp_path):
    model = make_model(HOG.model_copy(update={"vocab_size": 0}))
    model.save_pretrained(tmp_path / "out")
    again = m3ae_fast.load_model(tmp_path / "out")
    batch = pack([make_sample(0, words=None)], model.geometry)
    assert again.config.image_targets == "hog"
    assert torch.equal(again.predict(batch)[0], model.eval().predict(batch)[0])
    assert convert([str(tmp_path / "out"), "--out", str(tmp_path / "timm"), "--format", "timm"]) == 0
    assert "architecture" in json.loads((tmp_path / "timm/config.json").read_text())


def test_weights_of_another_target_are_refused(tmp_path, trainer):
    M3AE(TINY.model_copy(update={"vocab_size": 2048, "text_length": 16})).save_pretrained(tmp_path / "pixels")
    model = RUN["model"] | TINY.model_dump(mode="json") | {"image_targets": "hog", "init_from": f"{tmp_path}/pixels"}
    trainer.config.write_text(json.dumps(RUN | {"model": model | {"vocab_size": 2048, "text_length": 16}}))
    assert "was trained with model.image_targets = pixels, but the config has hog" in trainer("run", code=2)


@pytest.mark.slow
def test_loss_curves_equal_those_of_plain_torch_on_any_number_of_ranks(tmp_path):
    curves = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.jsonl"
        code, out = run_ranks("tests.helpers.zero_cases", ["hog", str(path)], ranks, tmp_path / f"{ranks}.log")
        assert code == 0, out[-3000:]
        curves += [np.array(curve) for _, curve in map(json.loads, path.read_text().splitlines())]
    assert len(curves) == 10 and np.ptp(curves[0][:, 0]) > 0.1
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_learns_and_resumes_bitwise(trainer):
    options = [*zero(None), "--set", "model.image_targets=hog", "--set", "train.save_every=3", "--set", "train.keep=9"]
    options += ["--set", "train.pictures=2", "--set", "train.precision=bf16", "--set", "train.eval_every=3"]
    trainer("run", *options)
    whole = trainer.losses("run")
    assert len(whole) == 6 and (trainer.folder / "run/reconstructions.png").exists()
    relative = [line[1] for line in trainer.lines("run", "val_image_relative")]
    assert relative[-1] < relative[0] and 0.5 < relative[-1] < 1.5
    for path in checkpoint.saved_steps(trainer.folder / "run"):
        if path.name != "step-00000003":
            shutil.rmtree(path)
    assert "steps 3 to 6" in trainer("run", *options, "--resume", "auto")
    assert trainer.losses("run") == whole
    trainer("two", *options, "--set", "train.precision=fp32", ranks=2)
    trainer("one", *options, "--set", "train.precision=fp32")
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(trainer.losses("one")), rtol=2e-5)
