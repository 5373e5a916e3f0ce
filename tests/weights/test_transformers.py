"""Vision models of transformers, by their names on the command line."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.embed import main as embed
from m3ae_fast.cli.evaluate import main as evaluate
from m3ae_fast.weights import transformers_model
from m3ae_fast.weights.open_library_model import open_library_model
from tests.helpers.labelled import labelled_tar

_MEAN, _STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
_IMAGES = {"do_normalize": True, "do_resize": True, "image_mean": _MEAN, "image_std": _STD}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VIT = transformers.ViTConfig(image_size=32, patch_size=8, **_SMALL)
_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}


def folder(tmp_path, config=_VIT, images=None, **changes):
    """Write random weights of a model and the description of its images, and return the name of the folder."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    about = _IMAGES | {"size": {"height": 32, "width": 32}} | (images or {}) | changes
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(about))
    return f"transformers:{tmp_path / 'model'}"


@pytest.mark.parametrize(
    "config, prefix, grid",
    [
        (_VIT, 1, 4),
        (transformers.Dinov2WithRegistersConfig(image_size=32, patch_size=16, **_SMALL), 5, 2),
        (transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, window_size=4), 0, 4),
        (transformers.DeiTConfig(image_size=32, patch_size=8, **_SMALL), 2, 4),
    ],
    ids=["vit", "registers", "swin", "deit"],
)
def test_the_tokens_of_patches_follow_those_of_the_image(tmp_path, config, prefix, grid):
    opened = open_library_model(folder(tmp_path, config))
    assert (opened.side, opened.channels, [*opened.mean], [*opened.std]) == (32, 3, _MEAN, _STD)
    assert opened.network.num_prefix_tokens == prefix
    image = torch.rand(2, 3, 32, 32)
    tokens = opened.network.forward_features(image)
    direct = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()(pixel_values=image).last_hidden_state
    assert tokens.shape[1:] == (prefix + grid**2, opened.network.num_features)
    torch.testing.assert_close(tokens, direct.detach())
    vector = tokens[:, 0] if prefix else tokens.mean(1)
    torch.testing.assert_close(opened.network(image), vector)


def test_a_cnn_has_maps_of_several_stages(tmp_path):
    opened = open_library_model(folder(tmp_path, transformers.ConvNextConfig(**_STAGES), image_size=64))
    image = torch.rand(1, 3, 64, 64)
    last, maps = opened.network.forward_intermediates(image, [-3, -2])
    assert last.shape == (1, 24, 2, 2) and [tuple(each.shape) for each in maps] == [(1, 8, 8, 8), (1, 16, 4, 4)]
    torch.testing.assert_close(opened.network(image), last.mean((2, 3)))


def test_of_a_model_of_images_and_texts_the_part_for_images_is_used(tmp_path):
    vision = {"image_size": 32, "patch_size": 16, **_SMALL}
    text = _TEXT | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    images = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    opened = open_library_model(folder(tmp_path, config, images))
    assert opened.architecture == "transformers' CLIPVisionModel" and opened.side == 32
    assert opened.network(torch.rand(2, 3, 32, 32)).shape == (2, 16)


def test_position_embeddings_are_interpolated_for_another_size(tmp_path):
    opened = open_library_model(f"{folder(tmp_path)}@48")
    assert opened.side == 48 and opened.network.forward_features(opened.black_image()).shape == (1, 37, 16)


def test_the_weights_of_a_classifier_are_left_out_and_its_missing_pooler_is_not_used(tmp_path):
    """The folder of a classifier lacks the weights of the pooler. Random ones would change the hash each time."""
    name = folder(tmp_path)
    transformers.ViTForImageClassification(_VIT).save_pretrained(tmp_path / "model")
    first, again = (open_library_model(name).network.state_dict() for _ in range(2))
    assert first.keys() == again.keys() and not any("pooler" in key for key in first)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_half_precision_weights_become_float32(tmp_path):
    name, file = folder(tmp_path), tmp_path / "model/model.safetensors"
    save_file({key: each.half() for key, each in load_file(file).items()}, file, {"format": "pt"})
    assert {each.dtype for each in open_library_model(name).network.parameters()} == {torch.float32}


class _Run:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_mistakes_are_one_line_each_and_no_code_is_run(tmp_path, capfd):
    name = folder(tmp_path)
    model, images = tmp_path / "model/model.safetensors", tmp_path / "model/preprocessor_config.json"
    sound, about, described = model.read_bytes(), (tmp_path / "model/config.json").read_text(), images.read_text()

    def refused(message, given=name):
        with pytest.raises(UserError, match=message) as error:
            open_library_model(given)
        assert str(error.value).startswith(given) and "\n" not in str(error.value)

    refused("no such folder", "transformers:")
    refused("from 1 to 4,096", f"{name}@5000")
    refused("no such folder", f"transformers:{tmp_path / 'missing'}")
    refused("does not accept images of 3 x 3 pixels", f"{name}@3")
    state = load_file(model)
    state.pop(lost := max(key for key in state if "pooler" not in key))
    save_file(state, model, {"format": "pt"})
    refused(f"lack 1 of the weights, for example {lost}")
    model.write_bytes(sound[:-100])
    refused("cannot open the model")
    model.unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Run(tmp_path / "was-run")}))
    refused("cannot open the model")
    assert not (tmp_path / "was-run").exists()
    model.write_bytes(sound)
    images.unlink()
    refused("no preprocessor_config.json describes its images")
    for key, value, message in (
        ("image_mean", [0.5], "image_mean in its config must be a list with a number for each of its 3 channels"),
        ("image_std", [0, 1, 1], "must be positive"),
        ("size", {"height": 32, "width": 24}, "describes no square images .* write NAME@SIDE"),
        ("size", {"height": [32], "width": 32}, "describes no square images"),
        ("rescale_factor", "one", "rescales values by 'one'"),
        ("do_rescale", False, "rescales values by .*; only 1 / 255 is supported"),
        ("rescale_factor", 1 / 127.5, "rescales values by .*; only 1 / 255 is supported"),
    ):
        images.write_text(json.dumps(json.loads(described) | {key: value}))
        refused(message)
    images.write_text(described)
    code = {"auto_map": {"AutoModel": "own.Model", "AutoConfig": "own.Config"}, "model_type": "own"}
    (tmp_path / "model/own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    (tmp_path / "model/config.json").write_text(json.dumps(json.loads(about) | code))
    refused("cannot open the model")
    assert not (tmp_path / "was-run").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_that_masks_patches_at_random_or_reads_text_is_refused(tmp_path):
    mae = transformers.ViTMAEConfig(image_size=32, patch_size=8, **_SMALL)
    with pytest.raises(UserError, match="ViTMAEModel computes different features each time"):
        open_library_model(folder(tmp_path, mae))
    bert = transformers.BertConfig(vocab_size=9, **_TEXT)
    with pytest.raises(UserError, match="BertModel is not a vision model"):
        open_library_model(folder(tmp_path, bert))


def test_a_name_on_the_hub_is_downloaded_by_transformers(tmp_path, monkeypatch):
    """Without a response of the Hub, only files that were downloaded before are used."""
    path, asked = folder(tmp_path).removeprefix("transformers:"), []

    def redirected(function):
        def call(source, **options):
            asked.append((source, options.get("revision"), options["local_files_only"]))
            return function(path, **{key: each for key, each in options.items() if key != "revision"})

        return call

    images = transformers.ImageProcessingMixin.get_image_processor_dict
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", redirected(transformers.AutoModel.from_pretrained))
    monkeypatch.setattr(transformers.ImageProcessingMixin, "get_image_processor_dict", redirected(images))
    for name, answers, revision, side in (
        ("a/b", True, None, 32),
        ("a/b@v1", False, "v1", 32),
        ("a/b@v1@48", True, "v1", 48),
    ):
        monkeypatch.setattr(transformers_model, "hub_answers", lambda source, answers=answers: answers)
        assert open_library_model(f"transformers:{name}").side == side
        assert asked[-2:] == [("a/b", revision, not answers)] * 2


@pytest.mark.slow
def test_its_features_are_evaluated_embedded_and_searched(tmp_path):
    name = folder(tmp_path)
    for split, first in (("train", 0), ("val", 40)):
        labelled_tar(tmp_path / f"{split}.tar", range(first, first + 40))
    shards = ["--train", str(tmp_path / "train.tar"), "--val", str(tmp_path / "val.tar")]
    assert evaluate(["knn", name, *shards, "--out", str(tmp_path / "knn"), "--no-baselines"]) == 0
    assert embed([name, str(tmp_path / "val.tar"), "--out", str(tmp_path / "out.npz")]) == 0
    features = np.load(tmp_path / "out.npz")["features"]
    assert features.shape == (40, 16) and features.std() > 0
    table = ["compare", name, *shards, "--probes", "knn", "--out", str(tmp_path / "compare")]
    assert evaluate(table) == 0
    assert name in (tmp_path / "compare/comparison.md").read_text()


def test_a_model_without_features_of_patches_is_refused():
    class Masks(torch.nn.Module):
        config = SimpleNamespace(num_channels=3)

        def forward(self, pixel_values):
            return SimpleNamespace(masks=pixel_values)

    with pytest.raises(UserError, match="NAME: Masks returns no features of patches"):
        transformers_model._Features(Masks(), 32, "NAME")
