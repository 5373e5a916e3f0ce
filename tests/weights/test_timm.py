"""Conversion of the image encoder to timm's VisionTransformer and back."""

import json
import re

import pytest
import timm
import torch
from PIL import ExifTags, Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.convert import main
from m3ae_fast.config import GRIDS, POOLS, ModelConfig
from m3ae_fast.model import M3AE
from m3ae_fast.weights.from_mae_or_timm import HEADS, IMAGENET, ViTOptions
from m3ae_fast.weights.timm_folder import read_timm_folder, write_timm

TINY = {
    "size": None,
    "emb_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "dec_emb_dim": 16,
    "dec_depth": 1,
    "dec_num_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "vocab_size": 11,
}


def make(**settings) -> tuple[M3AE, torch.Tensor, torch.Tensor]:
    """Return a model, uint8 images, and the same images normalised for it."""
    config = ModelConfig(**TINY | settings)
    torch.manual_seed(0)
    model = M3AE(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    images = torch.randint(0, 256, (3, config.channels, 24, 24), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return model, images, (images / 255 - mean) / std


CASES = {
    "types": {},
    "no types, wide": {"use_type_embedding": False, "mlp_ratio": 2.5},
    "MAE's": {"gelu": "exact", "positions": "stored", "vocab_size": 0},
    "a norm of the mean": {"mean_pool": "before_norm"},
    **{pool: {"pool": pool} for pool in POOLS if pool not in ("mean", *GRIDS)},
    "grey": {"channels": 1, "image_mean": [0.4], "image_std": [0.2]},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@torch.no_grad()
def test_timm_computes_the_same_features_and_its_weights_can_be_imported_again(tmp_path, settings):
    model, images, normal = make(**settings)
    if settings.get("positions") == "stored":
        model.encoder_input.positions.image.add_(torch.randn(9, 24))
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours = model.representation(images)
    pooled = model.encode(images, precision="fp32")
    torch.testing.assert_close(vit(normal), pooled, rtol=0, atol=2e-5)
    if not isinstance(vit.norm, torch.nn.Identity):
        torch.testing.assert_close(vit.forward_features(normal), ours, rtol=0, atol=2e-5)
    assert vit.pretrained_cfg["mean"] == list(model.config.image_mean)
    assert json.loads((tmp_path / "timm/config.json").read_text())["num_features"] == vit.num_features

    assert main([str(tmp_path / "timm"), "--out", str(tmp_path / "back")]) == 0
    with pytest.warns(UserWarning, match="only an encoder"):
        back = M3AE.from_pretrained(tmp_path / "back")
    for name in ("image_std", "gelu", "mean_pool"):
        assert getattr(back.config, name) == getattr(model.config, name)
    torch.testing.assert_close(back.representation(images), ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ["after_norm", "before_norm"])
def test_the_code_in_the_model_card_computes_the_features_of_encode(tmp_path, monkeypatch, order):
    """The features are equal for an image of the model's size. For other sizes, the two ways of resizing may differ by
    one 8-bit level, and the features agree within the effect of this difference."""
    model, images, _ = make(mean_pool=order)
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    monkeypatch.chdir(tmp_path)
    card, config = (tmp_path / "timm/README.md").read_text(), model.config
    assert f"/ 255), minus {config.image_mean}, divided by\n{config.image_std}. " in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    cases = {(24, 24): 1e-5, (48, 60): 5e-3, (60, 48): 5e-3, (64, 67): 5e-3, (48, 49): 5e-3, (200, 24): 5e-3}
    for size, close in cases.items():
        pixels = torch.nn.functional.interpolate(images[:1].float(), size, mode="bicubic").clamp(0, 255).byte()[0]
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        found: dict = {"image": image}
        with torch.no_grad():
            exec(code, found)
        expected = model.encode([image], precision="fp32")
        torch.testing.assert_close(found["features"], expected, rtol=0, atol=close)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@torch.no_grad()
def test_the_code_in_the_model_card_converts_images_as_encode_does(tmp_path, monkeypatch, channels, mode):
    """Transparent pixels become white unless the model has a channel for transparency."""
    model, _, _ = make(channels=channels, image_mean=[0.4] * channels, image_std=[0.2] * channels)
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "timm/README.md").read_text(), re.DOTALL)
    pixels = torch.randint(0, 256, (24, 24, 4), dtype=torch.uint8).numpy()
    turned = Image.fromarray(pixels)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    for image in (turned, *(Image.fromarray(pixels).convert(name) for name in ("L", "RGB", "LA", "P"))):
        found: dict = {"image": image}
        exec(code, found)
        assert found["image"].mode == mode
        torch.testing.assert_close(found["features"], model.encode([image], precision="fp32"), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_model_card_of_several_bands_has_no_code_for_pil_images(tmp_path, monkeypatch):
    model, _, normal = make(channels=5, image_mean=[0.4] * 5, image_std=[0.2] * 5)
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "timm/README.md").read_text(), re.DOTALL)
    exec(code, found := {"pixels": normal[0]})
    assert "PIL" not in code and found["features"].shape == (1, 24)


@torch.no_grad()
def test_a_pretrained_timm_model_is_imported(tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for p in vit.parameters():
        p.add_(0.1 * torch.randn_like(p))
    timm.models.save_for_hf(vit, str(tmp_path / "timm"), safe_serialization=True)
    assert main([str(tmp_path / "timm"), "--out", str(tmp_path / "out")]) == 0
    with pytest.warns(UserWarning, match="only an encoder"):
        model = M3AE.from_pretrained(tmp_path / "out")
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model.representation(images), vit.forward_features(images), rtol=0, atol=2e-5)
    # the option takes precedence over the value in the file
    assert main([str(tmp_path / "timm"), "--out", str(tmp_path / "other"), "--num-heads", "4"]) == 0
    assert json.loads((tmp_path / "other/config.json").read_text())["num_heads"] == 4


def test_the_number_of_heads_for_a_width_is_that_of_timm():
    with torch.device("meta"):
        names = ("tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14")
        vits = [timm.create_model(f"vit_{name}_224", depth=1) for name in names]
    assert {vit.embed_dim: vit.blocks[0].attn.num_heads for vit in vits} == HEADS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_values": 1.0}, "has a weight blocks.0.ls1.gamma, which"),
        ({"reg_tokens": 2}, "their number, 11, is not that of a square image"),
        ({"act_layer": "relu"}, "has the activation relu, which"),
        ({"norm_layer": "rmsnorm"}, "has the norm rmsnorm, which"),
        ({"qk_norm": True}, "has a weight blocks.0.attn.k_norm"),
    ],
)
def test_unsupported_vision_transformers_are_refused(tmp_path, settings, message):
    options = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **options, **settings)
    timm.models.save_for_hf(vit, str(tmp_path / "timm"), safe_serialization=True)
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "timm"), "--out", str(tmp_path / "out")])
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stated", [{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, {}, {"mean": [0.1, 0.2, 0.3]}])
def test_image_statistics_and_gelu_are_taken_from_the_folder_or_timms_defaults(tmp_path, nested, stated):
    """Mean and std are at the top level or in a separate section, depending on timm's version."""
    model, _, _ = make()
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    about = {"architecture": "vit_tiny_patch16_224"} | ({"pretrained_cfg": stated} if nested else stated)
    (tmp_path / "timm/config.json").write_text(json.dumps(about))
    config = read_timm_folder(tmp_path / "timm", ViTOptions(num_heads=4)).config
    known = (tuple(stated["mean"]), tuple(stated["std"])) if len(stated) == 2 else IMAGENET
    assert (config.image_mean, config.image_std) == known and (config.gelu, config.num_heads) == ("exact", 4)


def test_a_timm_folder_is_not_mistaken_for_an_export(tmp_path):
    model, _, _ = make()
    write_timm(tmp_path / "timm", model.config, model.state_dict())
    with pytest.raises(UserError, match="a timm model; convert it"):
        M3AE.from_pretrained(tmp_path / "timm")
    assert json.loads((tmp_path / "timm/config.json").read_text())["model_args"]["act_layer"] == "gelu_tanh"


def test_the_mean_takes_the_place_of_a_grid_in_timm(tmp_path, capsys):
    model, _, normal = make(pool="grid2")
    model.save_pretrained(tmp_path / "own")
    assert main([str(tmp_path / "own"), "--out", str(tmp_path / "timm"), "--format", "timm"]) == 0
    assert "timm has no pooling grid2: the written model computes the mean" in capsys.readouterr().out
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        expected = model.encode(normal, precision="fp32", pool="mean")
        torch.testing.assert_close(vit(normal), expected, rtol=0, atol=2e-5)


def test_a_run_is_exported_for_timm(run, tmp_path):
    assert main([str(run), "--out", str(tmp_path / "timm"), "--format", "timm"]) == 0
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert vit.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)
