"""Models that predict features of a frozen teacher (`model.image_targets: features`)."""

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

import m3ae_fast
from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import has_compiler
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.draw import main as draw
from m3ae_fast.config import Config, parse
from m3ae_fast.engine import build, memory_estimate
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import check_start, missing_decoder, read_pretrained, start_for
from m3ae_fast.pretraining import final_evaluation, size_and_length
from m3ae_fast.pretraining.automatic_settings import (
    Inputs,
    Shards,
    assumed,
    assumed_config,
    settings,
    teacher_settings,
)
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES
from m3ae_fast.pretraining.options import PretrainOptions
from m3ae_fast.pretraining.recipe_choice import PREFERRED, choose_recipe
from m3ae_fast.training.teacher import open_teacher, with_target_width
from tests.helpers.labelled import labelled_tar
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import CLIPART, SHORT, zero
from tests.helpers.trainer import TINY as RUN
from tests.helpers.zero_cases import TEACHERS
from tests.test_model import TINY, make_sample

PARTS = ("train", 0), ("val", 24)
VIT, CNN, CHANNELS_LAST = "test_vit", "test_resnet", "test_mambaout"
GREY = {"channels": 1, "image_mean": (0.5,), "image_std": (0.25,)}


def weights(folder, name, seed=0):
    """Write random weights of a timm model, and return its name as a teacher."""
    torch.manual_seed(seed)
    network = timm.create_model(name)
    for buffer in network.buffers():  # running statistics that differ from those of a batch
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.mul_(0.5 + torch.rand_like(buffer))
    file = folder / f"{name}-{seed}.safetensors"
    save_file(network.state_dict(), file)
    return f"timm:{name}={file}"


def config_of_name(teacher, precision="fp32", **model):
    """Return the config of a run with this teacher."""
    sections = {"model": TINY.model_dump(mode="json") | {"image_targets": "features"} | model}
    sections |= {"loss": {"teacher": str(teacher)}, "data": RUN["data"]}
    return parse(Config, sections | {"train": {"steps": 1, "precision": precision}}, "config")


def config_of(teacher, precision="fp32", **model):
    """Return the config of a run with this teacher and the width of its targets, and the teacher."""
    config = config_of_name(teacher, precision, **model)
    opened = open_teacher(config)
    return with_target_width(config, opened), opened


def images_of(config, count=3, dtype=torch.uint8):
    shape = count, config.model.channels, config.model.image_size, config.model.image_size
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(teacher, images, grid):
    """Return the targets of uint8 images, computed step by step with timm: float32 [B, L, K]."""
    name, _, file = teacher.removeprefix("timm:").partition("=")
    name, _, size = name.partition("@")
    network = timm.create_model(name, checkpoint_path=file).eval()
    if size and hasattr(network, "set_input_size"):
        network.set_input_size(img_size=int(size))
    about = network.pretrained_cfg
    side = int(size or about["input_size"][1])
    unit = F.interpolate(images / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        found = network.forward_features((unit - mean) / std)
        maps = [found]
        if found.ndim == 3:
            tokens = found[:, network.num_prefix_tokens :]
            maps = [tokens.transpose(1, 2).unflatten(2, (round(tokens.shape[1] ** 0.5),) * 2)]
        elif name in (CNN, CHANNELS_LAST):
            last = found.permute(0, 3, 1, 2) if name == CHANNELS_LAST else found
            maps = [
                *network.forward_intermediates((unit - mean) / std, indices=[-3, -2], intermediates_only=True),
                last,
            ]
    width = sum(each.shape[1] for each in maps)
    parts = []
    for each in maps:
        rows = F.interpolate(each, (grid, grid), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        centred = rows - rows.mean(2, keepdim=True)
        standard = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        parts.append(standard * (width / len(maps) / each.shape[1]) ** 0.5)
    return torch.cat(parts, 2)


@pytest.mark.parametrize(
    ("name", "width"), [(VIT, 64), (CNN, 336), (CHANNELS_LAST, 144), (f"{VIT}@96", 64), (f"{CNN}@48", 336)]
)
@pytest.mark.parametrize("size", [16, 32])
def test_the_targets_are_the_standardised_features_of_the_maps(tmp_path, name, width, size):
    """The teacher computes features in evaluation mode and without gradients, for each image by itself."""
    given = weights(tmp_path, name.partition("@")[0])
    teacher = given.replace(name.partition("@")[0], name, 1)
    config, opened = config_of(teacher, image_size=size)
    images = images_of(config)
    found = opened.features(images)
    assert config.model.target_width == opened.width == width and not found.requires_grad
    torch.testing.assert_close(found, expected(teacher, images, size // 4), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(opened.features(images[1:2]), found[1:2], rtol=1e-3, atol=1e-4)
    assert opened.features(images[:0]).shape == (0, *found.shape[1:])
    many = opened.features(images[:1].expand(70, -1, -1, -1))  # more images than the teacher encodes in one pass
    torch.testing.assert_close(many[69], found[0], rtol=1e-3, atol=1e-4)


def test_only_the_last_map_is_used_if_timm_does_not_return_the_maps_of_earlier_stages(tmp_path, monkeypatch):
    """The maps of earlier stages come from timm's `forward_intermediates`. They are not used if this method fails, or
    if it returns other last features than `forward_features`."""
    teacher = weights(tmp_path, CNN)
    original = timm.models.resnet.ResNet.forward_intermediates

    def fail(*_, **options):
        raise ValueError("no stages")

    def other(self, images, **options):
        last, maps = original(self, images, **options)
        return last + 1, maps

    for replaced in (fail, other):
        monkeypatch.setattr(timm.models.resnet.ResNet, "forward_intermediates", replaced)
        config, opened = config_of(teacher)
        images = images_of(config)
        found = opened.features(images)
        assert found.shape == (3, config.model.patches_per_image, 96) and opened.width == 96
        monkeypatch.undo()
        *_, last = config_of(teacher)[1].features(images).split([48, 192, 96], 2)
        torch.testing.assert_close(last * (3 * 96 / 336) ** 0.5, found)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", [VIT, CNN])
def test_a_folder_or_a_repository_of_timm_is_a_teacher(tmp_path, monkeypatch, name, safe):
    """The targets are the same as those of a network whose weights are in a single file."""
    teacher, folder = weights(tmp_path, name), tmp_path / "folder"
    network = timm.create_model(name, checkpoint_path=teacher.partition("=")[2])
    timm.models.save_for_hf(network, str(folder), safe_serialization=safe)

    def download(repo_id, filename, revision=None, **options):
        asked.add((repo_id, revision))
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    asked = set()
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    names = {
        teacher: (f"timm:local-dir:{folder}", "timm:hf-hub:owner/name", "timm:hf-hub:owner/name@v1"),
        teacher.replace("=", "@96="): (f"timm:local-dir:{folder}@96", "timm:hf-hub:owner/name@v1@96"),
    }
    for expected_name, others in names.items():
        config, opened = config_of(expected_name)
        for other in others:
            _, found = config_of(other)
            assert (found.identity, found.width, found.flops) == (opened.identity, opened.width, opened.flops)
            torch.testing.assert_close(found.features(images_of(config)), opened.features(images_of(config)))
    assert asked == {("owner/name", None), ("owner/name", "v1")}


def test_a_network_whose_modules_receive_a_parameter_as_an_argument_is_a_teacher(tmp_path):
    """Counting the FLOPs of such a network fails if the parameter requires a gradient."""
    network = timm.create_model("cait_xxs24_224", img_size=32, depth=1)
    timm.models.save_for_hf(network, str(tmp_path), safe_serialization=True)
    config, opened = config_of(f"timm:local-dir:{tmp_path}")
    assert opened.features(images_of(config)).shape == (3, 16, 192)


def with_config(source, folder, **changed):
    """Copy a folder of timm with other values in its config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changed
    (folder / "config.json").write_text(json.dumps(config))


def test_the_normalisation_is_a_part_of_the_identity(tmp_path):
    """The identity of a run's teacher is compared when the run resumes."""
    timm.models.save_for_hf(timm.create_model(VIT), str(tmp_path / "0"), safe_serialization=True)
    for number, changed in enumerate(({}, {"mean": [0.5, 0.5, 0.4]}, {"std": [0.5, 0.5, 0.4]}), 1):
        with_config(tmp_path / "0", tmp_path / str(number), **changed)
    found = [config_of(f"timm:local-dir:{tmp_path / str(number)}")[1].identity for number in range(4)]
    assert found[0] == found[1] and len(set(found)) == 3
    pattern = r"normalisation (\w{12}), weights (\w{12})$"
    scales, digests = zip(*(re.search(pattern, each).groups() for each in found))
    assert len(set(scales)) == 3 and len(set(digests)) == 1


def test_a_part_of_a_run_or_of_an_export_is_refused_and_the_message_names_the_folder_to_specify(tmp_path):
    M3AE(TINY).save_pretrained(tmp_path / "own")
    saved = checkpoint.step_folder(tmp_path / "run", 1)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").touch()
    saved.mkdir(parents=True)
    for name in ("state.json", "state.safetensors"):
        (saved / name).touch()
    cases = {
        "run/checkpoints": f"specify the run folder, {tmp_path}/run, or one of the checkpoints in ",
        "run/checkpoints/step-00000001/state.safetensors": f"is one file of .*; specify its folder, {saved}$",
        "own/model.safetensors": f"is one file of a checkpoint or an export; specify its folder, {tmp_path}/own$",
        "new": "this run has no checkpoint yet; continue the run, or specify another model",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"^loss.teacher: {tmp_path}/{name}: {message}"):
            open_teacher(config_of_name(tmp_path / name))
    for damage, reason in ((b"text", "model.safetensors cannot be read: "), (None, "contains no model.safetensors")):
        file = tmp_path / "own/model.safetensors"
        file.write_bytes(damage) if damage else file.unlink()
        with pytest.raises(UserError, match=rf"own: is not an exported M3AE \(it.* {reason}.*; create one with m3ae-f"):
            open_teacher(config_of_name(tmp_path / "own"))


def test_incomplete_or_hostile_weights_of_timm_are_refused_in_one_line(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    timm.models.save_for_hf(timm.create_model(VIT), str(tmp_path / "whole"), safe_serialization=True)
    for name in ("pickle", "lacks", "empty", "other", "list"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "whole/config.json", tmp_path / name)
    torch.save({"norm.weight": Hostile()}, tmp_path / "pickle/pytorch_model.bin")
    torch.save({"norm.weight": Hostile()}, tmp_path / "hostile.pth")
    state = load_file(tmp_path / "whole/model.safetensors")
    del state["blocks.1.norm1.weight"]
    save_file(state, tmp_path / "lacks/model.safetensors")
    (tmp_path / "other/config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "list/config.json").write_text("[]")
    (tmp_path / "text.safetensors").write_text("text")
    for name, wrong in (
        ("two", {"mean": [0.5, 0.5]}),
        ("no", {"mean": None}),
        ("words", {"std": "one"}),
        ("zero", {"std": [1, 0, 1]}),
    ):
        with_config(tmp_path / "whole", tmp_path / name, **wrong)
    cases = {
        f"timm:local-dir:{tmp_path / 'two'}": r"mean .* with a number for each of its 3 channels, not \[0.5, 0.5\]",
        f"timm:local-dir:{tmp_path / 'no'}": "mean .* for each of its 3 channels, not None",
        f"timm:local-dir:{tmp_path / 'words'}": "std .* for each of its 3 channels, not 'one'",
        f"timm:local-dir:{tmp_path / 'zero'}": r"std in its config is \[1.0, 0.0, 1.0\], but must be positive",
        f"timm:={tmp_path / 'text.safetensors'}": "there is no name of a model after timm:",
        f"timm:test_vitt={tmp_path / 'text.safetensors'}": "Unknown model .test_vitt.*; did you mean timm:test_vit",
        str(
            tmp_path / "text.safetensors"
        ): "is not an exported M3AE, which is a folder, but a file; .* write timm:NAME=",
        str(tmp_path): r"is not an exported M3AE \(it contains no config.json\)",
        "resnet50": "specify an export, a model on the Hub as owner/name, or, .* timm:NAME",
        f"timm:local-dir:{tmp_path / 'pickle'}": "posix.mkdir",
        f"timm:{VIT}={tmp_path / 'hostile.pth'}": "it refers to posix.mkdir, which is not loaded for security reasons",
        f"timm:local-dir:{tmp_path / 'lacks'}": r"Missing key\(s\) in state_dict: \"blocks.1.norm1.weight\"",
        f"timm:local-dir:{tmp_path / 'empty'}": "No suitable checkpoints found",
        f"timm:local-dir:{tmp_path / 'other'}": "KeyError 'architecture'",
        f"timm:local-dir:{tmp_path / 'list'}": "timm cannot open the model",
        f"timm:local-dir:{tmp_path / 'missing'}": "Config file not found",
        f"timm:{tmp_path / 'whole'}": "has no source prefix but looks like a",
        f"local-dir:{tmp_path / 'whole'}": f"write timm:local-dir:{tmp_path / 'whole'}",
        str(tmp_path / "whole"): f"is not an exported M3AE but a timm model; .* write timm:local-dir:{tmp_path}/whole",
        "hf-hub:owner/name": "write timm:hf-hub:owner/name",
        f"timm:{VIT}=": f"there is no file after =; to download the weights, write timm:{VIT}$",
        f"timm:{VIT}={tmp_path / 'text.safetensors'}": "text.safetensors: cannot be read",
        f"timm:{VIT}={tmp_path}": "is not a regular file",
        f"timm:{VIT}@small={tmp_path / 'whole/model.safetensors'}": f"Unknown model .{VIT}@small",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_teacher(config_of_name(name))
        assert str(error.value).startswith("loss.teacher: ") and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_model_of_transformers_is_a_teacher(tmp_path, kind):
    """A CNN has the last map and those of the two stages before it as targets, as one of timm has."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stages = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64}
    configs = {
        "vit": transformers.ViTConfig(image_size=48, patch_size=8, **size),
        "cnn": transformers.ConvNextConfig(**stages),
    }
    transformers.AutoModel.from_config(configs[kind]).save_pretrained(tmp_path / "model")
    side, mean, std = configs[kind].image_size, [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    about = {"size": {"height": side, "width": side}, "image_mean": mean, "image_std": std}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(about))
    config, opened = config_of(f"transformers:{tmp_path / 'model'}")
    images = images_of(config)
    unit = F.interpolate(images / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    network = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    given = (unit - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        found = network(pixel_values=given, output_hidden_states=True)
    if kind == "vit":
        maps = [found.last_hidden_state[:, 1:].mT.unflatten(2, (6, 6))]
    else:
        maps = [*found.hidden_states[-3:-1], found.last_hidden_state]
    width, grid = sum(each.shape[1] for each in maps), config.model.image_size // config.model.patch_size
    parts = []
    for each in maps:
        rows = F.interpolate(each, (grid, grid), mode="bilinear", antialias=True).flatten(2).mT
        parts.append(F.layer_norm(rows, rows.shape[2:]) * (width / len(maps) / each.shape[1]) ** 0.5)
    torch.testing.assert_close(opened.features(images), torch.cat(parts, 2), rtol=1e-3, atol=1e-4)
    architecture = type(network).__name__
    assert re.match(rf"transformers' {architecture}, images of {side} x {side} pixels, normalisation", opened.identity)
    for suffix in ("", "@32"):  # `pretrain` records absolute paths
        relative = f"transformers:{os.path.relpath(tmp_path / 'model')}{suffix}"
        assert f'loss.teacher="transformers:{tmp_path / "model"}{suffix}"' in teacher_settings(relative)


def test_an_own_model_is_a_teacher(tmp_path):
    """The targets are the standardised patch features of the exported model. Its decoder and captions are not used."""
    torch.manual_seed(0)
    own = M3AE(TINY.model_copy(update={"image_size": 24, "drop_path": 0.5}))
    own.save_pretrained(tmp_path / "own")
    config, opened = config_of(tmp_path / "own", patch_size=8)
    images = images_of(config)
    unit = F.interpolate(images / 255, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    maps = m3ae_fast.load_model(tmp_path / "own").patch_features(unit, value_range=(0, 1), precision="fp32")
    maps = F.interpolate(maps.permute(0, 3, 1, 2), (2, 2), mode="bilinear", antialias=True)
    standard = F.layer_norm(maps.flatten(2).mT, (24,))
    for _ in range(2):  # the second pass uses the index tensors that the first one has created
        torch.testing.assert_close(opened.features(images), standard, rtol=1e-3, atol=1e-4)
    assert opened.bytes < sum(each.nbytes for each in own.parameters())


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_images_of_every_dtype_have_the_same_targets(tmp_path, dtype):
    teacher = weights(tmp_path, VIT)
    config, opened = config_of(teacher)
    # no values near black and white: resizing can exceed this range, and then only integer images are clipped
    images = images_of(config) // 4 + 96
    config, other = config_of(teacher, image_dtype=dtype)
    mean, std = config.model.image_mean, config.model.image_std
    given = (images.int() * 257).to(torch.uint16) if dtype == "uint16" else normalised(images, mean, std)
    torch.testing.assert_close(other.features(given), opened.features(images), rtol=1e-2, atol=2e-2)


def test_grey_and_coloured_images_are_converted_for_the_teacher(tmp_path):
    """A teacher of coloured images receives grey images as three equal channels. For a teacher of grey images, the
    three channels of coloured images are added with the weights of Pillow."""
    teacher = weights(tmp_path, CNN)
    config, opened = config_of(teacher, **GREY)
    images = images_of(config)
    torch.testing.assert_close(
        opened.features(images), expected(teacher, images.expand(-1, 3, -1, -1), 4), rtol=1e-3, atol=1e-4
    )
    M3AE(TINY.model_copy(update=GREY)).save_pretrained(tmp_path / "grey")
    config, opened = config_of(tmp_path / "grey")
    images = images_of(config)
    grey = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None].round().to(torch.uint8)
    _, of_grey = config_of(tmp_path / "grey", **GREY)
    torch.testing.assert_close(opened.features(images), of_grey.features(grey), rtol=1e-2, atol=2e-2)
    five = {"channels": 5, "image_mean": [0.5] * 5, "image_std": [0.25] * 5}
    with pytest.raises(UserError, match=r"reads images with 3 channels, but the images of the run have 5 .* choose a "):
        config_of(teacher, **five)


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_the_loss_is_the_squared_error_at_masked_patches(tmp_path, attention, per):
    """With per="sample", the loss is averaged over the patches of each image and then over the images; with
    per="batch", over the patches of all images at once. Neither padding nor the features of visible patches count."""
    config, opened = config_of(weights(tmp_path, VIT), dec_attention=attention)
    torch.manual_seed(0)
    model = M3AE(config.model, config.loss.model_copy(update={"per": per})).eval()
    samples = [make_sample(i) for i in range(2)]
    samples += [Sample("text", tokens=samples[0].tokens, text_mask=samples[0].text_mask), make_sample(3, words=None)]
    with_image = [sample for sample in samples if sample.image is not None]
    features = opened.features(torch.stack([sample.image for sample in with_image]))
    losses = []
    for sample, own in zip(with_image, features):
        predicted_IK, _ = model.predict(pack([sample], model.geometry))
        losses.append((predicted_IK - own[sample.image_mask]).square().mean(1))
    mean = torch.cat(losses).mean() if per == "batch" else torch.stack([each.mean() for each in losses]).mean()
    for again in (False, True):
        batch = opened.with_targets(pack(samples, model.geometry, repeat_shapes=again))
        found = model(batch)
        torch.testing.assert_close(found.image_loss, mean, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.image_head.weight.shape == (64, 16) and model.image_head.weight.grad.any()
    texts = opened.with_targets(pack([samples[2]], model.geometry))
    assert model(texts).image_loss == 0 and texts.image_targets.shape == (0, 64)
    with pytest.raises(ValueError, match=r"image targets of shape \[0\], not \[\d+, 64\]"):
        model(pack(samples, model.geometry))


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_one_pass_serves_all_samples_that_share_an_image(tmp_path, attention, monkeypatch):
    """The targets are the same as if the batch contained the image once for each sample. One of the samples has no
    masked patches, and another one has no image."""
    config, opened = config_of(weights(tmp_path, VIT), dec_attention=attention)
    geometry = M3AE(config.model, config.loss).geometry
    apart = [make_sample(i) for i in range(7)]
    apart[3] = make_sample(3, image=False)
    shared = {1: 0, 2: 0, 5: 4}
    for i, first in shared.items():
        apart[i].image = apart[first].image
    apart[2].image_mask = torch.zeros_like(apart[2].image_mask)
    together = [replace(sample, same_image=i in shared) for i, sample in enumerate(apart)]
    seen, maps = [], opened._maps.forward
    monkeypatch.setattr(opened._maps, "forward", lambda images: seen.append(len(images)) or maps(images))
    targets = [opened.with_targets(pack(each, geometry)).image_targets for each in (apart, together)]
    assert seen == [6, 3]
    torch.testing.assert_close(*targets, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_not_a_part_of_the_model(tmp_path):
    config, opened = config_of(weights(tmp_path, CNN))
    model, before = M3AE(config.model, config.loss), opened.identity
    assert not any("teacher" in name for name in model.state_dict())
    assert len(model.state_dict()) == len(M3AE(TINY).state_dict())
    model.train()
    first, again = (opened.features(images_of(config)) for _ in range(2))
    assert torch.equal(first, again) and config_of(config.loss.teacher)[1].identity == before


def test_computations_in_bf16_have_nearly_the_same_targets(tmp_path):
    teacher = weights(tmp_path, VIT)
    exact, rough = (config_of(teacher, precision)[1] for precision in ("fp32", "bf16"))
    images = images_of(config_of(teacher)[0])
    one, other = exact.features(images), rough.features(images)
    assert other.dtype == torch.float32 and 0 < (one - other).abs().max() < 0.3


def allocated(work):
    """Return the largest number of bytes that torch's CPU allocator holds at the same time for `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(itertools.accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["own", VIT, CNN, CHANNELS_LAST])
def test_the_memory_of_a_pass_is_estimated_from_one_image(tmp_path, name, precision):
    """The estimate includes the images and the targets, which exist before and after the pass. In bf16, some kernels of
    a CPU copy their inputs."""
    if name == "own":
        M3AE(TINY.model_copy(update={"image_size": 64, "emb_dim": 96})).save_pretrained(tmp_path / name)
    config, opened = config_of(tmp_path / name if name == "own" else weights(tmp_path, name), precision)
    images = images_of(config, 16)
    # the first pass of a model of this library creates index tensors, which are kept; they must not be counted below
    opened.features(images)
    found = allocated(lambda: opened.features(images))
    features = 16 * config.model.patches_per_image * opened.width * 4
    needed = found + images.nbytes + features
    assert needed / (1.2 if precision == "fp32" else 2) < opened.pass_bytes(16) < 1.2 * needed
    assert opened.pass_bytes(16, 3) == opened.pass_bytes(16) + 2 * features
    views = config.model_copy(update={"data": config.data.model_copy(update={"repeats": 4})})
    shared = open_teacher(views)
    # 64 samples are 4 views each of 16 images
    assert shared.pass_bytes(64) == pytest.approx(opened.pass_bytes(16) + 3 * features)


def test_the_estimate_for_a_run_includes_the_pass_of_the_teacher(tmp_path, monkeypatch):
    """If a GPU has memory for all activations, but not for the teacher too, blocks recompute activations."""
    config, opened = config_of(weights(tmp_path, VIT))
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": True, "global_batch": 8})})
    asked = []
    monkeypatch.setattr(build, "make_engine", lambda *args: SimpleNamespace())
    monkeypatch.setattr(memory_estimate, "missing_memory", lambda needed, device: asked.append(needed) or "")
    ranks = SimpleNamespace(world=1, device=torch.device("cuda"), gather=lambda own: [own])
    for others in ([], [opened.pass_bytes]):
        build.build_engine(M3AE(config.model, config.loss), config, ranks, *others)
    assert asked[1] == asked[0] + opened.pass_bytes(8)


def test_what_a_teacher_cannot_do_is_refused_in_one_line(tmp_path):
    vit = weights(tmp_path, VIT)
    M3AE(TINY.model_copy(update={"resize": "native"})).save_pretrained(tmp_path / "native")
    cases = [
        ({"target_width": 63}, vit, "model.target_width is 63, but the teacher .* has 64 features"),
        ({"resize": "native"}, vit, "image_targets features needs resize square"),
        ({}, tmp_path / "native", "has model.resize native"),
        ({}, tmp_path / "missing", "missing"),
        ({}, "timm:test_vit@97=" + vit.partition("=")[2], "does not accept images of 97 x 97 pixels"),
        ({}, "timm:test_vit@0=" + vit.partition("=")[2], "from 1 to 4,096"),
        ({}, f"timm:test_resnet={vit.partition('=')[2]}", "the file lacks the weight"),
        ({}, "", "loss.teacher"),
        ({"image_targets": "hog"}, vit, "loss.teacher needs model.image_targets features, not hog"),
    ]
    for model, teacher, message in cases:
        with pytest.raises(UserError, match=message) as error:
            config_of(teacher, **model)
        assert "\n" not in str(error.value)
    data = {name: RUN[name] for name in ("model", "data", "train")}
    data["model"] = data["model"] | {"image_targets": "features"}
    with pytest.raises(UserError, match=r"image_targets features needs a teacher \(with pretrain: --teacher MODEL\)"):
        parse(Config, data, "config")
    one = data | {"loss": {"teacher": vit}, "data": RUN["data"] | {"repeats": 2}, "masking": {"per": "batch"}}
    with pytest.raises(
        UserError, match=r"data\.repeats 2 with a teacher .* set masking\.per to sample, or data\.repeats"
    ):
        parse(Config, one, "config")
    with pytest.raises(UserError, match=r"loss\.norm_pix standardises pixels"):
        parse(Config, data | {"loss": {"teacher": vit, "norm_pix": True}}, "config")
    with pytest.raises(ValueError, match=r"model\.target_width is not set"):
        M3AE(TINY.model_copy(update={"image_targets": "features"}))


def options(teacher, *settings):
    given = ["model.image_targets=features", f"loss.teacher={teacher}", "train.save_every=3", *settings]
    return [word for setting in given for word in ("--set", setting)]


@pytest.mark.slow
def test_loss_curves_equal_those_of_plain_torch_on_any_number_of_ranks(tmp_path):
    """The curves with each teacher are equal at every ZeRO stage. Sixteen samples are split over one, two and three
    ranks."""
    torch.manual_seed(0)
    M3AE(TINY.model_copy(update={"image_size": 24})).save_pretrained(tmp_path / "teacher")
    for name, file in ((VIT, "vit"), (CNN, "cnn")):
        Path(weights(tmp_path, name).partition("=")[2]).rename(tmp_path / f"{file}.safetensors")
    curves: dict[str, list[np.ndarray]] = {}
    for ranks in (1, 2, 3):
        path = tmp_path / f"{ranks}.jsonl"
        code, out = run_ranks("tests.helpers.zero_cases", ["features", str(path)], ranks, tmp_path / f"{ranks}.log")
        assert code == 0, out[-3000:]
        for teacher, curve in map(json.loads, path.read_text().splitlines()):
            curves.setdefault(teacher, []).append(np.array(curve))
    assert {*curves} == {*TEACHERS}
    for first, *others in curves.values():
        assert len(others) == 14 and np.ptp(first[:, 0]) > 0.05
        for curve in others:
            np.testing.assert_allclose(curve, first, rtol=1e-5)
    assert not np.allclose(curves[TEACHERS[1]][0], curves[TEACHERS[2]][0], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_mistakes_are_refused_once_on_all_ranks(trainer, ranks):
    """After a mistake, nothing is written. One of the mistakes is a run with only captions, which would not use its
    teacher."""
    vit = weights(trainer.folder, VIT)
    damaged = trainer.folder / "damaged.safetensors"
    damaged.write_bytes(Path(vit.partition("=")[2]).read_bytes()[:5000])
    cases = [
        ([*options(vit), "--set", "data.train.0.modality=text"], "data.train: no sample has an image, so the teacher"),
        (options(f"timm:{VIT}={damaged}"), "loss.teacher: .*damaged.safetensors: cannot be read"),
    ]
    for words, message in cases:
        out = trainer("run", *words, *zero(None), code=2, ranks=ranks)
        assert len(re.findall(message, out)) == 1 and "Traceback" not in out
        assert not (trainer.folder / "run/checkpoints").exists() and not (trainer.folder / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_run_learns_records_its_teacher_and_resumes_bitwise(trainer):
    """The run has a moving average of the weights, and several views of each sample."""
    teacher = weights(trainer.folder, CNN)
    settings = ["train.keep=9", "train.eval_every=3", "train.ema=0.9", "data.repeats=2"]
    words = [*options(teacher, *settings, "train.pictures=2"), *zero(None)]
    out = trainer("run", *words)
    whole = trainer.losses("run")
    assert len(whole) == 6 and "the targets are the 336 features per patch of timm:test_resnet" in out
    relative = [line[1] for line in trainer.lines("run", "val_image_relative")]
    assert relative[-1] < relative[0]
    last = checkpoint.saved_steps(trainer.folder / "run")[-1]
    info = checkpoint.read_info(last)
    assert info.config["loss"]["teacher"] == teacher and info.config["model"]["target_width"] == 336
    identity = info.stream["loss.teacher"]
    assert re.match(r"timm's test_resnet, images of 160 x 160 pixels, normalisation \w{12}, weights \w{12}$", identity)
    assert identity in out.replace("\n", " ")
    for path in checkpoint.saved_steps(trainer.folder / "run"):
        if path.name != "step-00000003":
            shutil.rmtree(path)
    moved = trainer.folder / "moved.safetensors"  # the same weights in another place
    shutil.copy(teacher.partition("=")[2], moved)
    trainer("run", *words, "--set", f"loss.teacher=timm:test_resnet={moved}", "--resume", "auto")
    assert trainer.losses("run") == whole
    other = weights(trainer.folder, CNN, seed=1)
    longer = ["--set", "train.steps=7", "--resume", "auto"]
    out = trainer("run", *words, *longer, "--set", f"loss.teacher={other}", code=2)
    assert "was made with loss.teacher = timm's test_resnet, images of 160 x 160 pixels, normalisation" in out
    out = trainer("run", *words, *longer, "--set", "model.image_targets=hog", "--set", "loss.teacher=null", code=2)
    assert "was made with model.image_targets = features, but the config has hog" in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_run_is_a_teacher_and_its_student_is_exported_without_it(trainer, tmp_path, capsys):
    """The export does not need the teacher. The figures show captions, but no features."""
    trainer("first", *zero(None))
    # on two ranks, some samples have only a part of their views on the same rank
    words = options(trainer.folder / "first", "train.pictures=2", "data.repeats=3")
    trainer("second", *words, *zero(None))
    trainer("two", *words, *zero(3), ranks=2)
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(trainer.losses("second")), rtol=2e-5)
    shutil.rmtree(trainer.folder / "first")
    run, out = trainer.folder / "second", tmp_path / "export"
    assert (run / "reconstructions.png").exists() and (run / "attention.png").exists()
    m3ae_fast.convert(run, out)
    model = m3ae_fast.load_model(out)
    assert model.config.target_width == 32 and not (out / "config.json").read_text().count("first")
    assert model.encode(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape[0] == 1
    val = ["--val", str(CLIPART / "val-0000.tar"), "--pictures", "2"]
    for what in ("reconstructions", "attention"):
        assert draw([what, str(out), *val, "--out", str(tmp_path / f"{what}.png")]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_a_run_with_compiled_blocks_has_the_same_losses(trainer):
    """The teacher, an own model, is not compiled."""
    torch.manual_seed(0)
    M3AE(TINY).save_pretrained(trainer.folder / "teacher")
    words = options(trainer.folder / "teacher", "train.steps=3", "model.depth=1", "model.dec_depth=1")
    for compiled in ("false", "true"):
        trainer(compiled, *words, *zero(None), "--set", f"train.compile={compiled}")
    np.testing.assert_allclose(np.array(trainer.losses("true")), np.array(trainer.losses("false")), rtol=1e-4)


@pytest.mark.slow
def test_features_of_an_image_only_model_are_not_drawn(trainer):
    words = options(weights(trainer.folder, VIT), "model.vocab_size=0", "data.tokenizer=null", "train.pictures=2")
    trainer("run", *words, *zero(None))
    run = trainer.folder / "run"
    assert (run / "attention.png").exists() and not (run / "reconstructions.png").exists()
    with pytest.raises(UserError, match="predicts features of a teacher, which cannot be drawn; use m3ae-fast draw"):
        draw(["reconstructions", str(run)])


@pytest.mark.slow
def test_a_dry_run_states_the_teacher_and_its_cost(trainer, capfd):
    teacher = weights(trainer.folder, VIT)
    out = trainer("run", *options(teacher), *zero(None), "--dry-run")
    line = next(line for line in out.splitlines() if line.startswith("teacher"))
    assert "the targets are the 64 features per patch of timm:test_vit" in line
    assert "GFLOP, " in line and "slower than the student" in line
    assert "0.00122 GB for its weights and about 0.0" in line
    elsewhere = ["--dry-run", "--no-data", "--world", "2", "--set", "model.target_width=64"]
    out = trainer("run", *options("/another/machine"), *zero(None), *elsewhere)
    assert "FLOPs per sample" in out and "\nteacher " not in out


def test_a_teacher_that_is_cheaper_than_the_student_is_not_reported_as_slow(tmp_path):
    M3AE(TINY).save_pretrained(tmp_path / "small")
    config, opened = config_of(tmp_path / "small", emb_dim=96, depth=8)
    assert "slower than the student" not in opened.describe(config)
    opened.flops = 1e12
    slow = opened.describe(config)
    assert "slower than the student: a smaller teacher, a teacher for smaller images, or a higher data.repeats" in slow
    views = config.model_copy(update={"data": config.data.model_copy(update={"repeats": 4})})
    ratio, shared = (float(re.search(r"([\d.e+]+) times", opened.describe(each))[1]) for each in (config, views))
    assert ratio == pytest.approx(4 * shared, rel=0.05) and "of the student on its 4 views" in opened.describe(views)


def test_pretrain_accepts_a_teacher_and_chooses_another_recipe(tmp_path, monkeypatch):
    """The relative path of the teacher is made absolute. Settings that contradict the teacher are refused in one
    line."""
    monkeypatch.chdir(tmp_path)
    weights(tmp_path, VIT)
    teacher = f"timm:{VIT}={VIT}-0.safetensors"
    options = PretrainOptions(source="photos", out="run", teacher=teacher)
    overrides = teacher_settings(options.teacher)
    assert overrides[1] == f'loss.teacher="timm:{VIT}={tmp_path / f"{VIT}-0.safetensors"}"'
    (tmp_path / "mine").mkdir()
    assert teacher_settings("mine")[1] == f'loss.teacher="{tmp_path / "mine"}"'
    assert teacher_settings("timm:local-dir:mine@96")[1] == f'loss.teacher="timm:local-dir:{tmp_path / "mine@96"}"'
    assert teacher_settings(f"timm:{VIT}=")[1] == f'loss.teacher="timm:{VIT}="'
    assert teacher_settings("owner/name")[1] == 'loss.teacher="owner/name"' and teacher_settings(None) == []
    found = choose_recipe(None, overrides, PREFERRED[1:])
    assert found.line.startswith("recipe: fast (") and "because" not in found.line
    config = assumed_config([*found.overrides, *overrides, "model.target_width=64"])
    assert (config.model.image_targets, config.loss.norm_pix) == ("features", False)
    cases = [
        ({"recipe": "hog"}, "recipe hog: its targets are not the features of a teacher; leave out recipe or teacher"),
        ({"recipe": "mae"}, r"recipe mae: .*loss\.norm_pix"),
        (
            {"overrides": ["model.image_targets=pixels"]},
            r"loss\.teacher needs model\.image_targets features, not pixels",
        ),
        ({"overrides": ["model.resize=native"]}, "image_targets features needs resize square"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            PretrainOptions(source="photos", out="run", teacher=teacher, **given)
    with pytest.raises(UserError, match=r"override loss\.teacher: use --teacher instead"):
        PretrainOptions(source="photos", out="run", overrides=[f"loss.teacher={teacher}"])


def test_the_teacher_is_evaluated_and_the_plan_includes_this_evaluation(tmp_path):
    teacher = f"timm:{VIT}"
    statistics, shards = assumed([]), Shards(["a.tar"], ["b.tar"], [])
    config = settings(Inputs(statistics, shards, tmp_path, teacher_settings(teacher)), MODEL_SIZES[0], 64, 1000)
    assert final_evaluation._models(config)[final_evaluation.TEACHER] == teacher
    assert size_and_length.evaluated_models(teacher_settings(teacher)) == size_and_length.evaluated_models([]) + 1


def test_an_encoder_continues_with_a_teacher(tmp_path):
    """A decoder is loaded only if it was trained with the same targets."""
    config, _ = config_of(weights(tmp_path, VIT))
    pixels, features = M3AE(TINY), M3AE(config.model, config.loss)
    for model in (pixels, features):
        model.save_pretrained(tmp_path / model.config.image_targets)
        found = read_pretrained(tmp_path / model.config.image_targets)
        start = start_for(config.model, found, norm_pix=False)
        assert start.has_decoder == (model is features)
        check_start(config.model, start, "here")
    found = read_pretrained(tmp_path / "pixels")
    missing = missing_decoder(found, start_for(config.model, found, norm_pix=False))
    assert missing.endswith("with model.dec_attention=self and model.image_targets=pixels")


@pytest.mark.slow
def test_a_teacher_that_cannot_be_evaluated_is_left_out(tmp_path, capsys):
    """The network has no pooling, so it computes no vector per image. The run is evaluated and exported."""
    shards = [str(labelled_tar(tmp_path / f"{name}.tar", range(first, first + 24))) for name, first in PARTS]
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, global_pool="", num_classes=0)
    timm.models.save_for_hf(network, str(tmp_path / "teacher"), safe_serialization=True)
    teacher, few = f"timm:local-dir:{tmp_path / 'teacher'}", [*SHORT, "data.workers=0", "train.precision=fp32"]
    outcome = m3ae_fast.pretrain(
        shards[0], tmp_path / "run", val=[shards[1]], teacher=teacher, overrides=few, device="cpu"
    )
    out = capsys.readouterr().out
    line = f"note: its teacher is not evaluated: {teacher}: computes features of the shape [5, 192], not one vector"
    assert line in out and not re.search(r"^its teacher  ", out, re.M)
    assert outcome.finished and outcome.export.is_dir() and final_evaluation.TEACHER not in outcome.results["knn"]


@pytest.mark.slow
def test_pretrain_trains_with_a_teacher_and_compares_the_run_with_it(tmp_path, capsys):
    shards = [str(labelled_tar(tmp_path / f"{name}.tar", range(first, first + 24))) for name, first in PARTS]
    teacher = weights(tmp_path, f"{CNN}").replace(CNN, f"{CNN}@64", 1)
    few = [*SHORT, "data.workers=0", "train.pictures=0", "train.precision=fp32"]
    outcome = m3ae_fast.pretrain(
        shards[0], tmp_path / "run", val=[shards[1]], teacher=teacher, overrides=few, device="cpu"
    )
    out = capsys.readouterr().out
    assert outcome.finished and "teacher: the targets are the 336 features per patch of timm:test_resnet@64" in out
    assert "recipe: fast (" in out and re.search(r"^its teacher  +\d", out, re.M)
    assert re.search(r"verdict: by .*its teacher", out)
    assert outcome.results.keys() == {"knn", "logistic"} and "its teacher" in outcome.results["knn"]
    with pytest.raises(UserError, match=r"was made with loss\.teacher = .*, but the config has"):
        m3ae_fast.pretrain(
            shards[0], tmp_path / "run", val=[shards[1]], teacher=weights(tmp_path, VIT), overrides=few, device="cpu"
        )
