"""Models with 13 bands: losses, features, figures and exports."""

import importlib.util
import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import prepare_image
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.draw import main as draw_program
from m3ae_fast.cli.evaluate import main as transfer
from m3ae_fast.cli.shards import main as data_tools
from m3ae_fast.config import Config, ModelConfig, load_config, parse
from m3ae_fast.data.batches_ahead import batch_bytes
from m3ae_fast.drawing.attention import draw_attention
from m3ae_fast.drawing.figures import levels
from m3ae_fast.drawing.reconstructions import draw_reconstructions, views_of
from m3ae_fast.images.bands import write_npy
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.weights.onnx_model import input_dtype, write_onnx
from m3ae_fast.weights.timm_folder import model_arguments, timm_weights, write_timm
from tests.helpers.trainer import ROOT, TINY

BANDS, SIZE = 13, 16
MEAN, STD = tuple(0.1 + 0.02 * i for i in range(BANDS)), tuple(0.2 + 0.01 * i for i in range(BANDS))
MASK = torch.arange(4) < 3


def make(dtype: str, **loss) -> M3AE:
    torch.manual_seed(0)
    config = ModelConfig(
        size=None, emb_dim=16, depth=1, num_heads=2, dec_emb_dim=16, dec_depth=1, dec_num_heads=2, vocab_size=0,
        image_size=SIZE, patch_size=8, channels=BANDS, image_dtype=dtype, image_mean=MEAN, image_std=STD,
        value_range="dtype",
    )  # fmt: skip
    return M3AE(config, (loss and parse(Config, TINY | {"loss": loss}, "test").loss) or None).eval()


def pixels(dtype: str) -> np.ndarray:
    """Return pixels [H, W, C] of a dtype."""
    unit = np.random.RandomState(0).rand(SIZE, SIZE, BANDS)
    return {"uint8": unit * 255, "uint16": unit * 65535, "float32": 3 * unit - 1}[dtype].astype(dtype)


def chw(dtype: str) -> torch.Tensor:
    return torch.from_numpy(pixels(dtype).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_losses_and_gradients_equal_those_of_normalised_float_images(dtype, norm_pix):
    model, image = make(dtype, norm_pix=norm_pix), chw(dtype)
    found = []
    for each in (image, normalised(image, MEAN, STD)):
        model.zero_grad()
        loss = model(pack([Sample("a", each, MASK)], model.geometry)).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_encode_accepts_arrays_files_and_tensors(dtype, tmp_path):
    model, values = make(dtype), pixels(dtype)
    (tmp_path / "a.npy").write_bytes(write_npy(values))
    alone = model.encode(values)
    assert torch.equal(model.encode([tmp_path / "a.npy", values]), alone.expand(2, -1)) and len(alone) == 1
    image = chw(dtype)
    normal = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tensors = normal[None] if dtype == "float32" else image[None]
    torch.testing.assert_close(model.encode(tensors), alone)
    if dtype == "uint16":
        levels = pixels("uint8")
        torch.testing.assert_close(model.encode(torch.from_numpy(levels).permute(2, 0, 1)), model.encode(levels))
        with pytest.raises(ValueError, match=r"the image has dtype torch\.int32, but must be uint16 or floating-point"):
            model.encode(image.int()[None])
    with pytest.raises(ValueError, match=r"the array \[16, 16, 12\] has 12 channels, but the model expects 13"):
        model.encode([values[..., :12]])


@pytest.mark.parametrize("size", [(16, 16), (40, 23)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_8_bit_images_are_bitwise_equal_in_every_accepted_form(dtype, size, tmp_path):
    """In every form, the image is converted to the dtype of the model, so that it can be combined with other images in
    a batch."""
    config = make(dtype).config.model_copy(update={"channels": 3, "image_mean": MEAN[:3], "image_std": STD[:3]})
    levels = np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(levels).permute(2, 0, 1)
    found = [prepare_image(given, config) for given in (levels, tensor, Image.fromarray(levels), tmp_path / "a.png")]
    assert {image.dtype for image in found} == {getattr(torch, dtype)}
    assert all(torch.equal(image, found[0]) for image in found)


def test_16_bit_weights_accept_normalised_float_images():
    """With ZeRO, weights have 16 bits, and autocast is not used."""
    model = make("float32")
    sample = Sample("a", normalised(chw("float32"), MEAN, STD), MASK)
    expected = model(pack([sample], model.geometry)).loss.item()
    found = model.to(torch.bfloat16)(pack([sample], model.geometry)).loss
    assert found.isfinite() and abs(found.item() - expected) < 0.05 * expected


def test_the_size_of_a_batch_depends_on_the_image_dtype():
    small, middle, large = (batch_bytes(make(dtype).geometry, 1) for dtype in ("uint8", "uint16", "float32"))
    assert (middle - small, large - small) == (BANDS * SIZE**2, 3 * BANDS * SIZE**2)
    assert pack([], make("uint16").geometry).images.dtype == torch.uint16


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_figures_show_the_requested_channels(dtype, tmp_path):
    model, image = make(dtype, norm_pix=True), chw(dtype)
    config = model.config
    if dtype == "float32":
        image = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    shown, grey = levels(image, config, (3, 2, 1)), levels(image, config)
    assert shown.shape == (3, SIZE, SIZE) and grey.shape == (1, SIZE, SIZE) and shown.dtype == torch.uint8
    if dtype == "uint8":
        assert torch.equal(shown, image[[3, 2, 1]]) and torch.equal(grey, image[:1])
    else:
        band = normalised(image, MEAN, STD)[2]
        assert (shown[1].float() / 255 - (band / 4 + 0.5).clamp(0, 1)).abs().max() < 0.003
    assert levels(chw("uint8")[:4], config).shape[0] == 3
    with pytest.raises(UserError, match=r"data.show_channels \[0, 1, 13\]: images have channels 0 to 12"):
        levels(image, config, (0, 1, 13))
    sample = Sample("a", image, MASK)
    # a perfect prediction looks like the original
    target = normalised(image, MEAN, STD).unflatten(2, (2, 8)).unflatten(1, (2, 8)).permute(1, 3, 2, 4, 0).flatten(0, 1)
    target = target.flatten(1)[MASK]
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    original, masked, rebuilt, _ = views_of(model, image, MASK, target)
    assert (original.int() - rebuilt.int()).abs().max() <= 1 and (masked != original).any()
    whole = Sample("a", image, MASK & False)
    for name, draw in (
        ("a", lambda path, c: draw_reconstructions(model, [sample], None, path, None, c)),
        ("b", lambda path, c: draw_attention(model, [whole], path, 1, channels=c)),
    ):
        files = [tmp_path / f"{name}{number}.png" for number in range(2)]
        for file, channels in zip(files, (None, (3, 2, 1))):
            draw(file, channels)
        first, second = (np.asarray(Image.open(file).convert("RGB")) for file in files)
        assert (first != second).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_exports_compute_the_same_features_as_encode(dtype, tmp_path):
    import timm

    model, values = make(dtype), pixels(dtype)
    expected = model.encode(values, precision="fp32")
    state = model.state_dict()
    assert model_arguments(model.config)["in_chans"] == BANDS
    vit = timm.models.VisionTransformer(**model_arguments(model.config)).eval()
    vit.load_state_dict(timm_weights(model.config, state))
    with torch.no_grad():
        unit = chw(dtype) / (65535 if dtype == "uint16" else 1)
        normal = (unit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(vit(normal[None]), expected, rtol=1e-4, atol=1e-5)
    write_timm(tmp_path / "timm", model.config, state)
    write_onnx(tmp_path / "a.onnx", model.config, state)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixels": chw(dtype)[None].numpy().astype(input_dtype(model.config))})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "own")
    again = M3AE.from_pretrained(tmp_path / "own")
    assert again.config == model.config and torch.equal(again.encode(values, precision="fp32"), expected)


@pytest.mark.parametrize(
    "model, data, message",
    [
        ({"channels": 13}, {}, "image_mean has 3 values for 13 channels; m3ae-fast shards stats SHARDS --chan"),
        ({"channels": 257}, {}, "model.channels: input should be less than or equal to 256"),
        ({"image_dtype": "int16"}, {}, "model.image_dtype"),
        ({}, {"show_channels": [0, 1, 3]}, r"data.show_channels \[0, 1, 3\]: the model has channels 0 to 2"),
        ({}, {"show_channels": [0, 1]}, "data.show_channels"),
        ({"image_targets": "vqgan", "image_dtype": "uint16"}, {}, "vqgan needs image_dtype uint8"),
    ],
)
def test_user_errors_are_reported_in_one_line(model, data, message):
    with pytest.raises(UserError, match=message):
        parse(Config, TINY | {"model": TINY["model"] | model, "data": TINY["data"] | data}, "test")


@pytest.mark.slow
def test_the_satellite_example_runs(tmp_path, monkeypatch, capsys):
    """The commands of the example, from synthetic images to a probe, run in this process."""
    spec = importlib.util.spec_from_file_location("satellite", ROOT / "examples" / "satellite.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    programs = {"shards": data_tools, "train": train.main, "draw": draw_program, "evaluate": transfer}

    def run(*command):
        assert programs[command[3]]([str(part) for part in command[4:]]) == 0

    monkeypatch.setattr(example, "run", run)
    monkeypatch.setattr("sys.argv", ["satellite.py", str(tmp_path), "--images", "48", "--steps", "2"])
    example.main()
    output = capsys.readouterr().out
    assert "images: 36 (NPY 36)" in output and "--set model.channels=13" in output and "drew" in output
    config = load_config(tmp_path / "config.json").model
    values = np.stack([np.load(path) for path in (tmp_path / "images").rglob("*.npy")]) / 10_000
    assert np.abs(np.array(config.image_mean) - values.mean((0, 1, 2))).max() < 0.02
    assert np.abs(np.array(config.image_std) - values.std((0, 1, 2))).max() < 0.02
    accuracy = json.loads((tmp_path / "knn" / "result.json").read_text())["top1"]
    assert accuracy > 0.6  # the four spectra differ clearly
    colours = np.asarray(Image.open(tmp_path / "bands.png").convert("RGB"))[24:184, 8:168]
    assert (colours[..., 0] != colours[..., 2]).any()
    # the figure that was plotted during training
    drawn = np.asarray(Image.open(tmp_path / "run" / "attention.png").convert("RGB"))[6:134, 6:134]
    assert (drawn[..., 0] != drawn[..., 2]).any()
