"""Image targets that are ids of a VQGAN. The tests compare the VQGAN with the official one, and the ids that loader
workers compute with those that are computed on the device."""

import json
from contextlib import nullcontext
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.convert import main as convert
from m3ae_fast.config import Config, DataConfig, LossConfig, MaskingConfig, ModelConfig, SourceConfig, parse
from m3ae_fast.data import Preparation, ShardStore, Share, eval_loader, open_corpus, train_loader
from m3ae_fast.drawing.reconstructions import decode_predicted, draw_reconstructions
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.verify.golden import Golden
from m3ae_fast.verify.vqgan import quantities
from m3ae_fast.vqgan.flax import convert_vqgan, from_flax
from m3ae_fast.vqgan.model import VQGAN, VQGANConfig, with_image_targets
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import TINY

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden/vqgan/vqgan.npz"
SMALL = VQGANConfig(32, 1, (1, 1, 1, 1), 8, 16)  # one code for 8 x 8 pixels
MODEL = ModelConfig(**{**TINY["model"], "vocab_size": 0, "image_targets": "vqgan", "codebook_size": 16})


@pytest.fixture
def vqgan():
    torch.manual_seed(0)
    return VQGAN(SMALL)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return M3AE(MODEL)


def samples(count, ids=None):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        found.append(Sample(str(i), image, draw_mask(16, 0.75, generator), image_ids=None if ids is None else ids[i]))
    return found


def test_the_default_sizes_are_those_of_the_published_vqgan():
    assert VQGANConfig() == VQGANConfig(128, 2, (1, 1, 2, 2, 4), 256, 1024)


def test_the_vqgan_equals_the_official_one():
    compared = list(quantities(Golden.load(GOLDEN), torch.device("cpu"), torch.float32))
    assert len(compared) == 8
    for name, ours, official, tolerance in compared:
        error = (ours - official).double().norm() / official.double().norm()
        assert error <= tolerance and len(official), name


def _flax_bytes(arrays):
    """Return the bytes that flax.serialization.to_bytes writes for the arrays."""
    tree = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        node[name] = msgpack.ExtType(1, packed)
    return msgpack.packb(tree)


def test_the_official_vqgan_file_is_converted(tmp_path):
    arrays = {key: array for key, array in Golden.load(GOLDEN).arrays.items() if key.startswith("params/")}
    (tmp_path / "tokenizer.msgpack").write_bytes(_flax_bytes(arrays))
    assert convert([str(tmp_path / "tokenizer.msgpack"), "--out", str(tmp_path / "out")]) == 0
    loaded, direct = VQGAN.from_pretrained(tmp_path / "out"), from_flax(arrays, "golden")
    assert loaded.config == direct.config == VQGANConfig(32, 1, (1, 1, 1, 2, 1), 24, 64)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), direct.state_dict().values(), strict=True)
    )
    assert not any(p.requires_grad for p in loaded.parameters())

    whole = (tmp_path / "tokenizer.msgpack").read_bytes()
    lacking = {key: array for key, array in arrays.items() if "Conv_1/kernel" not in key}
    more = {
        key.replace("ResBlock_5", "ResBlock_6"): array for key, array in arrays.items() if "encoder/ResBlock_5" in key
    }
    unknown = {**arrays, "params/encoder/Dense_0/kernel": np.zeros((2, 2), np.float32)}
    wrong = {
        "cut": (whole[:-100], "damaged"),
        "garbage": (b"\xc1 garbage", "damaged"),
        "number": (msgpack.packb(3), "its content must be a dictionary or an array, but has type int"),
        "hostile": (
            msgpack.packb({"params": msgpack.ExtType(1, msgpack.packb(((1 << 40,), "float32", b"")))}),
            "damaged",
        ),
        "other": (_flax_bytes({"params/Dense_0/kernel": np.zeros((2, 2), np.float32)}), "not the weights of"),
        "lacking": (_flax_bytes(lacking), "the weight .* is missing"),
        "a block less": (
            _flax_bytes({key: array for key, array in arrays.items() if "encoder/ResBlock_5/" not in key}),
            "5 blocks on 5 levels",
        ),
        "a block more": (_flax_bytes(arrays | more), "7 blocks on 5 levels"),
        "unknown": (_flax_bytes(unknown), "which does not exist in a MaskGIT VQGAN"),
        **{
            kind: (
                _flax_bytes({**arrays, key: arrays[key].astype(kind)}),
                f"{key} has dtype {kind}, but weights must be floating-point",
            )
            for key, kind in (
                ("params/quantizer/codebook", "int8"),
                ("params/encoder/Conv_0/kernel", "uint8"),
                ("params/decoder/GroupNorm_0/scale", "bool"),
                ("params/decoder/Conv_0/bias", "complex64"),
            )
        },
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            convert_vqgan(tmp_path / name, tmp_path / "none")
    with pytest.raises(UserError, match="No such file"):
        convert_vqgan(tmp_path / "nowhere", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="not a converted VQGAN"):
        VQGAN.from_pretrained(tmp_path)


def test_the_vqgan_is_frozen_and_other_folders_are_refused(vqgan, model, tmp_path):
    assert not any(p.requires_grad for p in vqgan.parameters()) and not vqgan.training
    vqgan.save_pretrained(tmp_path / "vqgan")
    written = json.loads((tmp_path / "vqgan/config.json").read_text(encoding="utf-8"))
    state = load_file(tmp_path / "vqgan/model.safetensors")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    for config, weights, message in (
        (written, state, None),
        ({**written, "kind": "vqvae"}, state, "its config.json is not that of a VQGAN"),
        (
            {key: value for key, value in written.items() if key != "kind"},
            state,
            "its config.json is not that of a VQGAN",
        ),
        ({**written, "num_res_blocks": 10**9}, state, r"more blocks than there are weights \(\d+\)"),
        (written, encoder, "it contains only an encoder"),
        ([1], state, "not a converted VQGAN"),
    ):
        (tmp_path / "vqgan/config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, tmp_path / "vqgan/model.safetensors")
        with pytest.raises(UserError, match=message) if message else nullcontext():
            VQGAN.from_pretrained(tmp_path / "vqgan")
    model.save_pretrained(tmp_path / "m3ae")
    with pytest.raises(UserError, match=r"its config\.json is not that of a VQGAN"):
        VQGAN.from_pretrained(tmp_path / "m3ae")


def test_8_bit_and_float_images_have_the_same_ids(vqgan):
    images = torch.stack([sample.image for sample in samples(11)])  # more images than are encoded at a time
    ids_BL = vqgan.encode(images)
    assert ids_BL.shape == (11, 16) and ids_BL.dtype == torch.int32 and len(ids_BL.unique()) > 3
    assert torch.equal(vqgan.encode(images / 255), ids_BL)
    z_BE = vqgan.features(images / 255).flatten(0, 2)
    nearest = torch.cdist(z_BE.double(), vqgan.codebook.double()).argmin(1)
    assert torch.equal(nearest.view(11, 16).int(), ids_BL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vqgan.encode(images), ids_BL)
    assert torch.equal(vqgan.double().encode(images), ids_BL) and vqgan.encode(images).dtype == torch.int32
    vqgan.float()
    assert vqgan.encode(images[:0]).shape == (0, 16)
    assert vqgan.decode(ids_BL.view(-1, 4, 4)).shape == images.shape


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_the_image_token_loss_is_the_cross_entropy_on_masked_patches(vqgan, attention):
    """The gradient of the loss reaches each weight of the decoder, and a step lowers the loss in an evaluation."""
    torch.manual_seed(1)
    model = M3AE(MODEL.model_copy(update={"dec_attention": attention}))
    images = torch.stack([sample.image for sample in samples(3)])
    ids_BL = vqgan.encode(images)
    batch = pack(samples(3, ids_BL), model.geometry)
    losses = model(batch)
    losses.loss.backward()
    logits_IK, _ = model.predict(batch)
    masks = [sample.image_mask for sample in samples(3)]
    parts = zip(logits_IK.split([int(mask.sum()) for mask in masks]), ids_BL, masks)
    expected = torch.stack([F.cross_entropy(logits, ids[mask].long()) for logits, ids, mask in parts]).mean()
    torch.testing.assert_close(losses.image_loss, expected)
    assert model.image_head.weight.shape == (16, 32) and model.image_head.weight.grad.any()
    assert all(p.grad.any() for p in model.decoder.parameters())
    torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.no_grad():
        assert 0 < model.eval()(batch).loss < losses.loss
    # the normalisation of images is undone before the tokenizer encodes them
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MODEL.image_mean, MODEL.image_std))
    for normalise in (lambda image: image, lambda image: (image / 255 - mean) / std):
        without = samples(3)
        for sample in without:
            sample.image = normalise(sample.image)
        found = with_image_targets(pack(without, model.geometry), vqgan, model.config)
        assert torch.equal(found.image_targets, batch.image_targets)
    with pytest.raises(ValueError, match="targets"):
        model(pack(samples(3), model.geometry))
    with pytest.raises(ValueError, match="1 of 2 images have image_ids"):
        pack([*samples(1, ids_BL), *samples(1)], model.geometry)


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_padding_rows_do_not_change_the_image_token_loss(vqgan, per):
    model = M3AE(MODEL, LossConfig(per=per))
    ids_BL = vqgan.encode(torch.stack([sample.image for sample in samples(3)]))
    exact, longer = (pack(samples(3, ids_BL), model.geometry, repeat_shapes=again) for again in (False, True))
    real_I = longer.image_row_weight != 0
    assert len(real_I) > len(exact.image_targets) and torch.equal(longer.image_targets[real_I], exact.image_targets)
    assert not longer.image_targets[~real_I].any()
    assert torch.equal(
        with_image_targets(pack(samples(3), model.geometry, repeat_shapes=True), vqgan, MODEL).image_targets,
        longer.image_targets,
    )
    torch.testing.assert_close(model(longer).image_loss, model(exact).image_loss)


def _loader(tmp_path, shards, train, **preparation):
    store = ShardStore(tmp_path / "cache")
    sources = [SourceConfig(shards=str(shards), modality="image")]
    corpus = open_corpus(sources, store)
    ready = Preparation(M3AE(MODEL).geometry, MaskingConfig(), None, 0, **preparation)
    config, share = DataConfig(train=sources, workers=0), Share(4)
    return train_loader(config, corpus, ready, share, range(3)) if train else eval_loader(config, corpus, ready, share)


def test_ids_computed_in_workers_and_on_the_device_agree(tmp_path, vqgan):
    shards = write_tar(tmp_path / "a.tar", members(range(8), "image"))
    here = list(_loader(tmp_path, shards, True, image_tokenizer=vqgan))
    later = list(_loader(tmp_path, shards, True))
    for one, other in zip(here, later, strict=True):
        assert len(one.image_targets) == len(one.image_rows) and not len(other.image_targets)
        assert torch.equal(with_image_targets(other, vqgan, MODEL).image_targets, one.image_targets)


def test_reconstructions_are_drawn_with_the_vqgan_decoder(tmp_path, vqgan, model):
    sheets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.image_head.bias, std=10)
        draw_reconstructions(model, samples(2), None, tmp_path / "a.png", vqgan)
        sheets.append(np.asarray(Image.open(tmp_path / "a.png")).astype(int))
    changed = np.abs(sheets[0] - sheets[1]).max((0, 2)) > 0
    assert changed[2 * 168 : 3 * 168].any() and not changed[: 2 * 168].any()  # only the third image differs


def test_the_true_ids_as_predictions_give_the_image_of_the_decoder(vqgan, model):
    (sample,) = samples(1)
    ids_L = vqgan.encode(sample.image[None])[0]
    vqgan.decoder.convs[-1].bias.data.fill_(0.5)
    exact = vqgan.decode(ids_L.view(1, 4, 4))[0].clamp(0, 1) * 255
    logits_IK = F.one_hot(ids_L[sample.image_mask].long(), 16).float()
    shown = decode_predicted(model, vqgan, sample.image, sample.image_mask, logits_IK)
    assert exact.std() > 1
    torch.testing.assert_close(shown.float(), exact, rtol=0, atol=0.501)


def test_user_errors_are_reported(vqgan, tmp_path):
    config = {"model": {**TINY["model"], "image_targets": "vqgan"}, "data": TINY["data"], "train": TINY["train"]}
    with pytest.raises(UserError, match=r"data\.image_tokenizer: model\.image_targets vqgan needs"):
        parse(Config, config, "config")
    config["data"] = {**TINY["data"], "image_tokenizer": str(tmp_path)}
    with pytest.raises(UserError, match=r"loss\.norm_pix"):
        parse(Config, {**config, "loss": {"norm_pix": True}}, "config")
    with pytest.raises(UserError, match="3 channels"):
        parse(
            Config,
            {**config, "model": {**config["model"], "channels": 1, "image_mean": [0.5], "image_std": [1.0]}},
            "c",
        )
    vqgan.check_fits(8, 16, "vqgan")
    for patch in (4, 16):
        with pytest.raises(UserError, match=r"set model\.patch_size to 8"):
            vqgan.check_fits(patch, 16, "vqgan")
    for codes in (8, 1024):
        with pytest.raises(UserError, match=r"set model\.codebook_size to 16"):
            vqgan.check_fits(8, codes, "vqgan")


def test_a_run_can_be_trained_with_ids_computed_on_the_device(trainer, vqgan):
    vqgan.save_pretrained(trainer.folder / "vqgan")
    options = [
        "model.image_targets=vqgan",
        "model.codebook_size=16",
        f"data.image_tokenizer={trainer.folder / 'vqgan'}",
    ]
    options += ["train.steps=4", "train.pictures=2", "train.eval_samples=16"]
    for where in ("device", "workers"):
        trainer(where, *(word for o in [*options, f"data.image_tokens={where}"] for word in ("--set", o)))
        assert (trainer.folder / where / "reconstructions.png").exists()
    assert trainer.losses("device") == trainer.losses("workers")
    lines = map(json.loads, (trainer.folder / "device/metrics.jsonl").read_text().splitlines())
    held_out = [line["val_image_loss"] for line in lines if "val_image_loss" in line]
    assert held_out[-1] < held_out[0] and abs(held_out[0] - np.log(16)) < 1

    with torch.no_grad():
        vqgan.state_dict()[next(iter(vqgan.state_dict()))].add_(1)
    vqgan.save_pretrained(trainer.folder / "vqgan")
    words = [word for o in [*options, "train.steps=5"] for word in ("--set", o)]
    out = trainer("device", *words, "--resume", "auto", code=2)
    assert "was made with data.image_tokenizer" in out and "which changes the stream of samples" in out
