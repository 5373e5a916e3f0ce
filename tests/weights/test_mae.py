"""Checkpoints of facebookresearch/mae: features, losses, and settings that an M3AE does not support."""

import argparse
import dataclasses
import os
from functools import partial

import pytest
import timm
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch import Sample, pack
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.cli.convert import main
from m3ae_fast.config import LossConfig
from m3ae_fast.model import M3AE
from m3ae_fast.training.throughput import StepCounts
from m3ae_fast.weights.from_mae_or_timm import IMAGENET, ViTOptions, config_of
from m3ae_fast.weights.importing import read_source
from tests.helpers.mae import MAE, PATCH, SIZE
from tests.weights.official_pickle import Call

# the published sizes: timm's vit_tiny to vit_huge
HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
HEADS = ["--num-heads", "3", "2"]


def make(seed: int = 0) -> tuple[MAE, torch.Tensor, torch.Tensor]:
    """Return an MAE, uint8 images, and the same images normalised for it."""
    torch.manual_seed(seed)
    mae = MAE()
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return mae, images, (images / 255 - mean) / std


def convert(tmp_path, saved, *options: str) -> M3AE:
    torch.save(saved, tmp_path / "mae.pth")
    assert main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out"), *HEADS, *options]) == 0
    return M3AE.from_pretrained(tmp_path / "out")


def masks() -> list[torch.Tensor]:
    """Return masks with different numbers of masked patches, because with equal numbers, the mean over patches equals
    the mean over images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(9, generator=generator) < share for share in (0.3, 0.6, 0.8, 0.95)]


@torch.no_grad()
def test_features_equal_those_of_mae(tmp_path, capsys):
    mae, images, normal = make()
    model = convert(tmp_path, {"model": mae.state_dict(), "epoch": 3})
    torch.testing.assert_close(model.representation(images), mae.tokens(normal), rtol=0, atol=2e-5)
    output = capsys.readouterr().out
    assert "set loss.per=batch" in output and "tokenizer" not in output  # the model does not accept captions


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_and_gradients_equal_those_of_mae_for_any_split_into_micro_batches(tmp_path, norm_pix):
    mae, images, normal = make()
    expected = mae.loss(normal, torch.stack(masks()), norm_pix)
    expected.backward()
    start = convert(tmp_path, {"model": mae.state_dict()})
    model = M3AE(start.config, LossConfig(per="batch", norm_pix=norm_pix))
    model.load_state_dict(start.state_dict())
    samples = [Sample(str(i), image, mask) for i, (image, mask) in enumerate(zip(images, masks()))]
    whole = pack(samples, model.geometry)
    torch.testing.assert_close(model(whole).loss, expected.detach(), rtol=1e-5, atol=0)
    parts = [pack(samples[:3], model.geometry), pack(samples[3:], model.geometry)]  # as of two micro-batches or ranks
    counts = LossCounts(*map(sum, zip(*(part.counts for part in parts))))
    assert counts == whole.counts == (sum(mask.sum().item() for mask in masks()), 0)
    step = StepCounts.of(parts, model.config)  # the counts that are summed over ranks
    assert (step.images, step.loss_image, step.loss_text) == (4, *counts)
    loss = sum(model(part, counts).loss for part in parts)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in (
        (model.decoder.blocks[0].mlp.fc1.weight, mae.decoder_blocks[0].mlp.fc1.weight),
        (model.encoder.blocks[0].attn.qkv.weight, mae.blocks[0].attn.qkv.weight),
        (model.patch_embed.weight, mae.patch_embed.proj.weight),
    ):
        grad = theirs.grad if theirs.ndim == 2 else theirs.grad.permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(ours.grad, grad, rtol=1e-4, atol=1e-6)


def test_the_loss_per_sample_differs_from_the_loss_per_batch(tmp_path):
    mae, images, _ = make()
    start = convert(tmp_path, {"model": mae.state_dict()})
    samples = [Sample(str(i), image, mask) for i, (image, mask) in enumerate(zip(images, masks()))]
    per_batch = dataclasses.replace(start.geometry, loss_per_batch=True)
    one, other = (start(pack(samples, geometry)).loss for geometry in (start.geometry, per_batch))
    assert abs(one - other) > 1e-3


@torch.no_grad()
def test_encoder_alone_warns_and_computes_the_same_features(tmp_path):
    mae, images, normal = make()
    weights = {name: tensor for name, tensor in mae.state_dict().items() if not name.startswith(("decoder", "mask"))}
    with pytest.warns(UserWarning, match="only an encoder: the decoder is randomly initialised"):
        model = convert(tmp_path, {"model": weights})
    torch.testing.assert_close(model.representation(images), mae.tokens(normal), rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_fine_tuned_mae_encoder_normalises_the_mean(tmp_path, capsys):
    """The network equals the network of MAE's fine-tuning: timm's model with the last norm after mean pooling."""
    mae, images, normal = make()
    weights = {name: tensor for name, tensor in mae.state_dict().items() if not name.startswith(("decoder", "mask"))}
    weights = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in weights.items()
    }
    saved = {"model": weights | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}}
    with pytest.warns(UserWarning, match="only an encoder"):
        model = convert(tmp_path, saved | {"args": argparse.Namespace(lr=1.0, device="cuda")})
    assert "model.mean_pool is before_norm" in capsys.readouterr().out
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = timm.models.VisionTransformer(**sizes, global_pool="avg", fc_norm=True, norm_layer=norm).eval()
    vit.load_state_dict(weights)
    expected = vit(normal)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(model.encode(images, precision="fp32"), expected, **close)
    batch = pack([Sample(str(i), image, torch.zeros(9) > 0) for i, image in enumerate(images)], model.geometry)
    pooled, patches = model.pooled_and_patches(batch, [2])
    torch.testing.assert_close(pooled[:, 0], expected, **close)
    torch.testing.assert_close(patches[:, 0], model.forward_encoder(batch).unflatten(0, (4, -1))[:, 1:])
    torch.testing.assert_close(model.pooled(batch, "cls"), model.pooled_and_patches(batch, [2], ["cls"])[0][:, 0])
    assert (patches[:, 0].mean(1) - expected).abs().max() > 1e-2  # the other order gives a different result


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        ({"norm_pix_loss": True}, "=true\n"),
        ({"norm_pix_loss": False}, "=false\n"),
        ({"epochs": 800}, " (true if MAE was trained with --norm_pix_loss, otherwise false)\n"),
    ],
)
def test_the_conversion_prints_the_loss_settings_of_the_run(tmp_path, capsys, args, settings):
    mae, _, _ = make()
    convert(tmp_path, {"model": mae.state_dict(), "args": argparse.Namespace(**args)})
    assert f"set loss.per=batch and loss.norm_pix{settings}" in capsys.readouterr().out


def extra(weights):
    weights["blocks.0.ls1.gamma"] = torch.ones(24)


def cut(weights):
    del weights["blocks.1.mlp.fc1.bias"]


def other(weights):
    for name in list(weights):
        weights[f"resnet.{name}"] = weights.pop(name)
    weights["resnet.batches"] = torch.tensor(0)


def moved(weights):
    weights["decoder_pos_embed"] = torch.ones_like(weights["decoder_pos_embed"])


def moved_a_little(weights):
    weights["decoder_pos_embed"][0, 0] = 0
    weights["decoder_pos_embed"][0, 0, -1] = 1e-3


def wide(weights):
    weights["norm.weight"] = torch.ones(25)


def both_norms(weights):
    weights["fc_norm.weight"] = torch.ones(24)


def flat_patches(weights):
    weights["patch_embed.proj.weight"] = torch.zeros(24, 3, PATCH, PATCH + 1)


def grey(weights):
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :1]


def one_patch_more(weights):
    weights["pos_embed"] = torch.zeros(1, 11, 24)


def two_axes(weights):
    weights["cls_token"] = weights["cls_token"][0]


def header(weights):
    weights["header.weight"] = torch.ones(2)


MISTAKES = {
    both_norms: "has a weight fc_norm.weight, which an M3AE cannot represent",
    flat_patches: "its patches are not square, or their number, 9, is not that of a square image",
    one_patch_more: "its patches are not square, or their number, 10, is not that of a square image",
    grey: "has 1 channel, but 3 means and 3 standard deviations are known; use a folder that timm has saved",
    two_axes: "lacks the weight cls_token with 3 axes",
    header: "has a weight header.weight, which an M3AE cannot represent",
    extra: "has a weight blocks.0.ls1.gamma, which an M3AE cannot represent",
    cut: "lacks the weight blocks.1.mlp.fc1.bias",
    other: "is neither an MAE nor a timm ViT: it lacks the weight cls_token",
    moved: "decoder_pos_embed is not 0 for the cls token",
    moved_a_little: "decoder_pos_embed is not 0 for the cls token",
    wide: "encoder.norm.weight has shape [25], but the model config expects [24]",
}


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__)
def test_weights_that_do_not_fit_are_named(tmp_path, change):
    weights = dict(make()[0].state_dict())
    change(weights)
    with pytest.raises(UserError) as caught:
        convert(tmp_path, {"model": weights})
    assert MISTAKES[change] in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["mae.pth"]


@pytest.mark.parametrize("width", HEADS_BY_WIDTH)
def test_settings_missing_in_a_file_are_given_as_options_or_are_those_of_the_published_size(width):
    patch = torch.zeros(width, 3, 2, 2)
    weights = {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, 5, width),
        "patch_embed.proj.weight": patch,
    }
    weights |= {
        "blocks.0.norm1.weight": torch.ones(width),
        "blocks.0.mlp.fc1.weight": torch.zeros(3 * width // 2, width),
    }
    config = config_of(weights, ViTOptions(), "after_norm", "here")
    assert (config.num_heads, config.gelu, config.depth) == (HEADS_BY_WIDTH[width], "exact", 1)
    assert (config.dec_emb_dim, config.dec_num_heads, config.dec_depth) == (512, 16, 8)
    assert (config.mlp_ratio, config.image_size, config.patch_size) == (1.5, 4, 2)
    assert (config.image_mean, config.image_std) == IMAGENET
    config = config_of(weights, ViTOptions(width // 8, 4, gelu="tanh"), "after_norm", "here")
    assert (config.num_heads, config.dec_num_heads, config.gelu) == (width // 8, 4, "tanh")


@pytest.mark.parametrize("kind", ["bare", "state_dict", "model", "old"])
def test_weights_are_found_in_the_file_layouts_of_known_programs(tmp_path, kind):
    """Files may also contain weights that fine-tuning adds, in any floating-point dtype. Weights are loaded on the CPU,
    regardless of the device on which they were saved."""
    weights = {name: tensor.double() for name, tensor in make()[0].state_dict().items()}
    weights |= {
        "head.weight": torch.ones(2),
        "head": torch.ones(1),
        "fc.bias": torch.ones(2),
        "head_drop.p": torch.ones(1),
    }
    saved = {"bare": weights, "state_dict": {"state_dict": weights}}.get(kind, {"model": weights, "epoch": 1})
    torch.save(saved, tmp_path / "a.bin", _use_new_zipfile_serialization=kind != "old")
    found = read_source(str(tmp_path / "a.bin"), ViTOptions(3, 2))
    assert found.has_decoder and {tensor.dtype for tensor in found.state.values()} == {torch.float32}
    torch.testing.assert_close(found.state["encoder.norm.weight"].double(), weights["norm.weight"])


def test_the_number_of_heads_must_be_given_if_it_is_unknown(tmp_path):
    torch.save({"model": make()[0].state_dict()}, tmp_path / "mae.pth")
    with pytest.raises(
        UserError,
        match="the number of attention heads for width 24 is unknown; specify it with m3ae-fast convert --num-heads",
    ):
        main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="emb_dim 24 is not divisible by num_heads 5"):
        main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out"), "--num-heads", "5", "2"])
    with pytest.raises(
        UserError, match="width 16 is unknown; specify it with m3ae-fast convert --num-heads ENCODER DECODER"
    ):
        main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out"), "--num-heads", "3"])
    with pytest.raises(UserError, match="specify one number, or two: encoder and decoder"):
        main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out"), "--num-heads", "3", "2", "1"])


@pytest.mark.parametrize("old_format", [False, True])
def test_malicious_and_damaged_files_execute_no_code(tmp_path, monkeypatch, old_format):
    monkeypatch.chdir(tmp_path)
    options = {"_use_new_zipfile_serialization": not old_format}
    for call in (Call(exec, "open('PWNED', 'w').close()"), Call(os.system, "touch PWNED")):
        torch.save({"model": call}, "mae.pth", **options)
        with pytest.raises(UserError, match=r"it refers to .*, which is not loaded for security reasons"):
            main(["mae.pth", "--out", "out"])
    torch.save({"model": make()[0].state_dict()}, "mae.pth", **options)
    data = (tmp_path / "mae.pth").read_bytes()
    (tmp_path / "mae.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as caught:
        main(["mae.pth", "--out", "out"])
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["mae.pth"]
