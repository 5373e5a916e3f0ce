"""Runs that start from given weights (model.init_from), and the parts of these weights that are not trained."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, ModelConfig, parse
from m3ae_fast.model import M3AE
from m3ae_fast.model.pretrained import ENCODER, Pretrained, check_start, check_weights
from m3ae_fast.training.init_from import start_from
from m3ae_fast.weights.converting import convert
from tests.helpers.checkpoints import changes_of
from tests.helpers.mae import MAE
from tests.helpers.trainer import TINY, zero


def lines(trainer, run: str) -> list[dict]:
    return [json.loads(line) for line in (trainer.folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_initialised_with_the_final_weights_of_another_run(trainer, run):
    """On two ranks with ZeRO-3, the held-out losses before the first step equal those after the last step of the other
    run."""
    convert(run, trainer.folder / "start")
    out = trainer(
        "run", "--set", f"model.init_from={trainer.folder / 'start'}", "--set", "train.steps=1", *zero(3), ranks=2
    )
    assert f"weights from {trainer.folder / 'start'}\n" in out
    ended = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    for name in ("val_image_loss", "val_text_loss"):
        assert lines(trainer, "run")[0][name] == pytest.approx(ended[name], rel=1e-5)
    convert(trainer.folder / "run", trainer.folder / "out")
    assert "init_from" not in json.loads((trainer.folder / "out/config.json").read_text())


@pytest.mark.slow
def test_a_converted_mae_can_be_trained_further_with_its_position_embeddings(trainer):
    """Position embeddings from the checkpoint stay bitwise unchanged with bf16 weights, in checkpoints, in a resumed
    run and in an export. A missing decoder is initialised."""
    torch.manual_seed(0)
    mae = MAE().state_dict()
    encoder = {name: tensor for name, tensor in mae.items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, trainer.folder / "mae.pth")
    convert(trainer.folder / "mae.pth", trainer.folder / "mae", num_heads=3)
    config = json.loads((trainer.folder / "mae/config.json").read_text())
    config |= {"init_from": str(trainer.folder / "mae"), "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 2}
    tiny = json.loads(trainer.config.read_text()) | {"model": config, "loss": {"per": "batch", "norm_pix": True}}
    tiny["data"] = {key: value for key, value in tiny["data"].items() if key != "tokenizer"}
    for source in (*tiny["data"]["train"], *tiny["data"]["val"]):
        source["modality"] = "image"
    trainer.config.write_text(json.dumps(tiny))
    options = ["--set", "train.precision=bf16", *zero(1)]
    out = trainer("run", *options, "--set", "train.steps=2")
    assert "; the weights contain no decoder, so the decoder is randomly initialised\n" in out
    out = trainer("run", *options, "--set", "train.steps=4", "--resume", "auto")
    assert "weights from" not in out
    assert [line["step"] for line in lines(trainer, "run") if "loss" in line] == [1, 2, 3, 4]
    convert(trainer.folder / "run", trainer.folder / "out")
    model = M3AE.from_pretrained(trainer.folder / "out")
    assert (model.encoder_input.positions.image == mae["pos_embed"][0, 1:]).all()
    assert not torch.equal(model.encoder.norm.bias, mae["norm.bias"])


def shorter(folder):
    state = load_file(folder / "model.safetensors")
    state["encoder.blocks.0.attn.qkv.weight"] = state["encoder.blocks.0.attn.qkv.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors")


def other_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_heads": 8}))


def no_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_folder(folder):
    folder.rename(folder.with_name("elsewhere"))


MISTAKES = {
    shorter: "encoder.blocks.0.attn.qkv.weight has shape [95, 32], but the model config expects [96, 32]",
    other_heads: "was trained with model.num_heads = 8, but the config has 4",
    no_weights: "not an exported M3AE",
    no_folder: "no such file or folder",
}


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__)
def test_weights_that_do_not_fit_are_named(tmp_path, run, change):
    convert(run, tmp_path / "start")
    change(tmp_path / "start")
    alone = SimpleNamespace(on_main=lambda work: work(), from_main=lambda value: value)
    model = M3AE(ModelConfig(**TINY["model"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        start_from(model, str(tmp_path / "start"), alone)
    assert MISTAKES[change] in str(caught.value) and "\n" not in str(caught.value)
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())


def test_a_decoder_with_the_other_attention_is_not_loaded(tmp_path):
    torch.manual_seed(0)
    whole = M3AE(ModelConfig(**TINY["model"]))
    whole.save_pretrained(tmp_path / "start")
    alone = SimpleNamespace(on_main=lambda work: work(), from_main=lambda value: value)
    crossed = M3AE(whole.config.model_copy(update={"dec_attention": "cross"}))
    before = {name: tensor.clone() for name, tensor in crossed.state_dict().items()}
    line = start_from(crossed, str(tmp_path / "start"), alone)
    assert line.endswith(
        "start; the decoder of the weights was trained with model.dec_attention=self and model.image_targets=pixels, "
        "so the decoder is randomly initialised"
    )
    for name, tensor in crossed.state_dict().items():
        expected = whole.state_dict()[name] if name.startswith(ENCODER) else before[name]
        assert torch.equal(tensor, expected), name
    again = M3AE(whole.config)
    assert start_from(again, str(tmp_path / "start"), alone) == f"weights from {tmp_path / 'start'}"
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_invalid_initial_weights_are_reported_in_one_line_and_leave_no_files(trainer):
    out = trainer("run", "--set", "model.init_from=nowhere", code=2)
    assert "error: nowhere: no such file or folder; specify an export" in out and "Traceback" not in out
    assert not (trainer.folder / "run").exists()


def test_a_run_is_not_resumed_with_another_activation_function(run):
    path = checkpoint.saved_steps(run)[-1]
    info = checkpoint.read_info(path)
    config = parse(Config, info.config, "run")
    changes_of(path, info, config, info.stream)
    changed = parse(Config, info.config | {"model": info.config["model"] | {"gelu": "exact"}}, "run")
    with pytest.raises(UserError, match=r"was made with model\.gelu = tanh, but the config has exact"):
        changes_of(path, info, changed, info.stream)


def test_every_setting_of_a_model_affects_its_weights_or_is_compared():
    """Some settings change neither the names nor the shapes of weights, but how the weights are used. `model.init_from`
    requires that these settings are equal."""
    base = {
        **TINY["model"],
        "vocab_size": 64,
        "image_targets": "pixels",
        "output_head_depth": 1,
        "value_range": [0, 255],
    }
    others = {
        "emb_dim": 64, "depth": 1, "dec_emb_dim": 64, "dec_depth": 1, "mlp_ratio": 2, "output_head_depth": 2,
        "use_type_embedding": False, "patch_size": 4, "channels": 1, "vocab_size": 65, "dec_attention": "cross",
    }  # fmt: skip
    compared = {
        "num_heads": 2, "dec_num_heads": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
        "image_targets": "vqgan", "gelu": "exact", "positions": "stored", "mean_pool": "before_norm",
        "value_range": [0, 4095],
    }  # fmt: skip
    free = {"size", "drop_path", "init_from", "pool"}
    # Sin-cos positions fit any size, and the bit depth may be higher. The codebook size and the width of a teacher
    # change the shapes of weights if they are used.
    adapted = {"image_size", "text_length", "codebook_size", "target_width", "image_dtype"}
    adapted |= {"resize", "max_patches", "min_patches", "native_positions"}
    assert ModelConfig.model_fields.keys() == others.keys() | compared.keys() | free | adapted

    def config(**changes):
        grey = {"image_mean": [0.5], "image_std": [0.5]} if "channels" in changes else {}
        return parse(ModelConfig, base | grey | changes, "model")

    model = M3AE(config())
    start = Pretrained(model.config, model.state_dict())
    check_start(config(drop_path=0.1, init_from="x"), start, "x")
    for name, value in compared.items():
        with pytest.raises(UserError, match=rf"x: was trained with model\.{name} = "):
            check_start(config(**{name: value}), start, "x")
    check_start(config(resize="native", native_positions="centred", max_patches=9), start, "x")
    check_start(config(), Pretrained(config(resize="native", native_positions="centred"), start.state), "x")
    native = Pretrained(config(resize="native"), start.state)
    with pytest.raises(UserError, match=r"model\.native_positions = absolute"):
        check_start(config(resize="native", native_positions="centred"), native, "x")
    for name, value in others.items():
        with pytest.raises(UserError, match=r"model config"):
            check_weights(M3AE(config(**{name: value})), start.state, "x")
    encoder = {name: tensor for name, tensor in start.state.items() if name.startswith(ENCODER)}
    check_start(config(dec_num_heads=2, image_targets="vqgan"), Pretrained(model.config, encoder), "x")
