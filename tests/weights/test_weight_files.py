"""The allowed contents of weight files. The sizes that they state are accepted only if they fit the weights."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import read_tensors
from m3ae_fast.cli.convert import main
from m3ae_fast.config import ModelConfig
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.model import M3AE
from m3ae_fast.model.card import model_card
from m3ae_fast.model.pretrained import Pretrained, check_weights, weights_digest, write_pretrained
from m3ae_fast.vqgan.model import VQGAN, VQGANConfig
from m3ae_fast.weights.converting import convert
from m3ae_fast.weights.timm_folder import write_timm
from tests.helpers.mae import MAE

SIZES = {
    "size": None, "emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 2,
    "image_size": 16, "patch_size": 8, "vocab_size": 0,
}  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NORM = {"exported": "encoder.norm.weight", "classifier": "backbone.encoder.norm.weight", "vqgan": "encoder.norm.weight"}
FILES = {"classifier": "classifier.safetensors"}


def exported(folder):
    model = M3AE(ModelConfig.model_validate(SIZES))
    write_pretrained(folder, Pretrained(model.config, model.state_dict()))
    return lambda: M3AE.from_pretrained(folder)


def classifier(folder):
    made = Classifier(
        ClassifierConfig(
            model=ModelConfig.model_validate(SIZES), head="finetune", pool="mean", modality="image", classes=[0, 1]
        )
    )
    made.backbone.reset_parameters()
    made.save_pretrained(folder)
    return lambda: Classifier.from_pretrained(folder)


def vqgan(folder):
    VQGAN(VQGANConfig(32, 1, (1, 2), 4, 8)).save_pretrained(folder)
    return lambda: VQGAN.from_pretrained(folder)


def timm_folder(folder):
    model = M3AE(ModelConfig.model_validate(SIZES))
    write_timm(folder, model.config, model.state_dict())
    return lambda: main([str(folder), "--out", str(folder.with_name("out")), "--num-heads", "2"])


def timm_file(folder):
    timm_folder(folder)
    return lambda: main([str(folder / "model.safetensors"), "--out", str(folder.with_name("out")), "--num-heads", "2"])


MAKERS = pytest.mark.parametrize(
    "make", [exported, classifier, vqgan, timm_folder, timm_file], ids=lambda make: make.__name__
)


@MAKERS
def test_a_pipe_in_place_of_weights_is_refused_without_waiting(tmp_path, make):
    load = make(tmp_path / "model")
    path = tmp_path / "model" / FILES.get(make.__name__, "model.safetensors")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        load()
    with pytest.raises(UserError, match=r"already contains .*; specify a new folder"):
        exported(tmp_path / "model")


@MAKERS
def test_only_floats_of_16_to_64_bits_are_accepted_as_weights(tmp_path, make):
    load = make(tmp_path / "model")
    path = tmp_path / "model" / FILES.get(make.__name__, "model.safetensors")
    state, name = load_file(path), NORM.get(make.__name__, "norm.weight")
    for dtype in OTHERS:
        save_file(state | {name: torch.ones(len(state[name])).to(dtype)}, path)
        with pytest.raises(UserError, match=f"{name} has dtype {str(dtype)[6:]}, but weights must be float32, float16"):
            load()
        assert not (tmp_path / "out").exists()
    for dtype in FLOATS:
        save_file(state | {name: state[name].to(dtype)}, path)
        load()


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_a_file_with_other_tensors_is_named_by_every_reader(tmp_path, dtype):
    path = tmp_path / "any.safetensors"
    save_file({"fine": torch.ones(2), "odd": torch.ones(3).to(dtype)}, path)
    with pytest.raises(UserError, match=f"{path}: odd has dtype {str(dtype)[6:]}, but weights must be"):
        read_tensors(path)


def test_integers_in_a_torch_file_are_refused_as_weights(tmp_path):
    weights = MAE().state_dict()
    torch.save({"model": weights | {"norm.weight": torch.ones(24, dtype=torch.int32)}}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match=r"norm\.weight has dtype int32, but weights must be"):
        main([str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out"), "--num-heads", "3", "2"])


@pytest.mark.parametrize("name", ["model.safetensors", "classifier.safetensors"])
def test_no_memory_is_allocated_for_sizes_that_differ_from_the_weights(tmp_path, name):
    """The stated size is a petabyte, which no machine can allocate."""
    load = (exported if name == "model.safetensors" else classifier)(tmp_path / "model")
    path = tmp_path / "model" / name.replace("model.safetensors", "config.json").replace("safetensors", "json")
    config = json.loads(path.read_text())
    huge = {"emb_dim": 1 << 16, "mlp_ratio": 64.0, "num_heads": 2}
    path.write_text(json.dumps(config | (huge if name == "model.safetensors" else {"model": config["model"] | huge})))
    with pytest.raises(UserError, match=r"has shape \[.*\], but the model config expects \["):
        load()


def test_position_embeddings_of_an_impossibly_large_image_are_refused(tmp_path):
    load = exported(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 1 << 16}))
    with pytest.raises(UserError, match="position embeddings of 67,108,864 patches or tokens with width 16"):
        load()


def test_a_vqgan_config_with_more_blocks_than_weights_is_refused(tmp_path):
    load = vqgan(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_res_blocks": 1 << 40}))
    with pytest.raises(UserError, match="requires more blocks than there are"):
        load()


@pytest.mark.parametrize("make", [exported, classifier, vqgan, timm_folder], ids=lambda make: make.__name__)
def test_a_config_nested_too_deeply_is_refused(tmp_path, make):
    load = make(tmp_path / "model")
    path = tmp_path / "model" / ("classifier.json" if make is classifier else "config.json")
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_the_format_of_an_export_is_changed_only_if_its_weights_fit(tmp_path):
    exported(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    for change, message in (
        ({"encoder.norm.weight": torch.full((16,), torch.nan)}, "encoder.norm.weight is not finite"),
        (
            {"encoder.norm.weight": torch.ones(8)},
            r"encoder.norm.weight has shape \[8\], but the model config expects \[16\]",
        ),
    ):
        save_file(state | change, path)
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "model", tmp_path / "timm", format="timm")
        assert not (tmp_path / "timm").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_a_single_non_finite_value_is_found_in_any_weight(value, place):
    model = M3AE(ModelConfig.model_validate(SIZES))
    state = model.state_dict()
    check_weights(model, state, "here")
    for name, tensor in state.items():
        spoilt = tensor.clone()
        spoilt.view(-1)[place] = value
        with pytest.raises(UserError, match=f"here: {name} is not finite"):
            check_weights(model, state | {name: spoilt}, "here")


def test_a_digest_depends_on_every_value_and_name():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    seen = {
        weights_digest(state),
        weights_digest({"a": state["a"]}),
        weights_digest({"c": state["a"], "b": state["b"]}),
    }
    for name, tensor in state.items():
        for place in range(tensor.numel()):
            other = tensor.clone()
            other.view(-1)[place] += 1
            seen.add(weights_digest(state | {name: other}))
    assert len(seen) == 3 + 9
    copied = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.items()}
    assert weights_digest(copied) in seen


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_model_files_have_the_users_default_permissions(tmp_path, umask):
    config = ModelConfig(size=None, emb_dim=8, depth=1, num_heads=1, dec_emb_dim=8, dec_depth=1, dec_num_heads=1)
    old = os.umask(umask)
    try:
        M3AE(config).save_pretrained(tmp_path / "out")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) > 2 and set(modes.values()) == {0o666 & ~umask}


@pytest.mark.parametrize("vocab", [0, 50])
def test_the_model_card_contains_the_sizes_of_the_model(vocab):
    config = ModelConfig(
        size=None, emb_dim=12, depth=3, num_heads=2, dec_emb_dim=20, dec_depth=4, dec_num_heads=5,
        image_size=48, patch_size=8, text_length=17, vocab_size=vocab,
    )  # fmt: skip
    card = model_card("me/it", config)
    sentence = card.partition("arXiv 2205.14204: ")[2].partition("\n\n")[0]
    assert [int(n) for n in re.findall(r"\d+", sentence)] == [3, 12, 48, 48, 8, 8, *([17] if vocab else [])]
    assert "[B, 3, 48, 48] -> [B, 1 + 36, 12]" in card
    assert ("model.encode(images, texts)" if vocab else "model.encode(images)") in card
