"""Checkpoints of the official JAX code: their results, and checkpoints that are rejected."""

import os
import pickle

import numpy as np
import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import train_tokenizer
from m3ae_fast.cli.convert import main
from m3ae_fast.model import M3AE
from m3ae_fast.weights.from_mae_or_timm import ViTOptions
from m3ae_fast.weights.importing import read_source
from tests.helpers.official import make_golden
from tests.helpers.shards import caption
from tests.weights.official_pickle import Call, write_checkpoint

FLAGS = {
    "discretized_image": False,
    "data.image_size": 24,
    "data.tokenizer_max_length": 7,
    "data.tokenizer": "bert-base-uncased",
    "data.image_normalization": "custom",
    "data.custom_image_mean": "0.57-0.55-0.52",
    "data.custom_image_std": "0.32-0.31-0.33",
}


def golden(tmp_path, **config) -> dict[str, np.ndarray]:
    with np.load(make_golden(tmp_path / "golden.npz", config=config)) as file:
        return {key: file[key] for key in file.files}


def params_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("params/"): array for key, array in arrays.items() if key.startswith("params/")}


def flags(prefix: str = "m3ae", **changes) -> dict:
    heads = {f"{prefix}.num_heads": 3, f"{prefix}.dec_num_heads": 2, f"{prefix}.model_type": None}
    return FLAGS | heads | changes


def error_of(error: float, expected: np.ndarray) -> float:
    return np.abs(error - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"use_type_embedding": False, "output_head_depth": 2, "mlp_ratio": 3, "dec_depth": 1}],
    ids=["types", "heads of MLPs"],
)
def test_features_and_losses_equal_those_of_the_official_code(tmp_path, capsys, config):
    arrays = golden(tmp_path, **config)
    write_checkpoint(tmp_path / "a.pkl", params_of(arrays), flags(), protocol=4)
    assert main([str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("official M3AE checkpoint, 2 steps: encoder and decoder")
    model = M3AE.from_pretrained(tmp_path / "out")
    images = torch.from_numpy(arrays["in/image_u8"]).permute(0, 3, 1, 2).contiguous()
    text, padding = (torch.from_numpy(arrays[f"in/{name}"]) for name in ("text", "text_padding_mask"))
    ours = model.representation(images, text, padding).detach().numpy()
    seen = np.ones(ours.shape[:2], dtype=bool)
    seen[:, -padding.shape[1] :] = padding.numpy() == 0
    assert error_of(ours[seen], arrays["out/representation"][seen]) < 2e-5
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_an_image_only_checkpoint_with_its_flag_names_is_imported(tmp_path):
    arrays = golden(tmp_path, use_type_embedding=False)
    params = {name: array for name, array in params_of(arrays).items() if "text" not in name}
    variant = {key.replace("data.", "cc12m_data."): value for key, value in flags("mae").items()} | {"dataset": "cc12m"}
    found = read_source(str(write_checkpoint(tmp_path / "a.pkl", params, variant, frozen=True)), ViTOptions())
    assert found.config.vocab_size == 0 and found.config.image_mean == (0.57, 0.55, 0.52)
    assert "image_head.weight" in found.state and found.kind.startswith("official MAE")


CC12M, IMAGENET = (0.5762, 0.5503, 0.5213, 0.3207, 0.3169, 0.3307), (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, (24, 7, 3, 2, *CC12M)),  # the script has no flag for the normalisation
        ({"data.image_normalization": "cc12m"}, (24, 7, 3, 2, *CC12M)),
        ({"data.image_normalization": "imagenet"}, (24, 7, 3, 2, *IMAGENET)),
        ({"data.image_normalization": "none"}, (24, 7, 3, 2, 0, 0, 0, 1, 1, 1)),
        ({"data.image_size": 40, "data.tokenizer_max_length": 11}, (40, 11, 3, 2, *CC12M)),
        ({"data.image_size": None, "data.tokenizer_max_length": None}, (256, 64, 3, 2, *CC12M)),
        ({"m3ae.num_heads": 6, "m3ae.dec_num_heads": 4}, (24, 7, 6, 4, *CC12M)),
        ({"m3ae.dec_num_heads": None}, (24, 7, 3, 16, *CC12M)),
        ({"m3ae.num_heads": 5, "m3ae.model_type": "debug"}, (24, 7, 16, 16, *CC12M)),
        (
            {"data.image_normalization": "custom", "data.custom_image_std": "1-2-3"},
            (24, 7, 3, 2, 0.57, 0.55, 0.52, 1, 2, 3),
        ),
    ],
)
def test_settings_are_taken_from_the_flags_or_their_defaults(tmp_path, stated, expected):
    """None denotes a flag that the script does not have."""
    wide = stated.get("m3ae.dec_num_heads", 2) is None or "m3ae.model_type" in stated
    arrays = golden(tmp_path, **({"emb_dim": 48, "dec_emb_dim": 32} if wide else {}))
    changed = {"data.image_normalization": None} | stated
    given = {name: value for name, value in (flags() | changed).items() if value is not None}
    c = read_source(str(write_checkpoint(tmp_path / "a.pkl", params_of(arrays), given)), ViTOptions()).config
    found = (c.image_size, c.text_length, c.num_heads, c.dec_num_heads, *c.image_mean, *c.image_std)
    assert found == expected and c.patch_size == 8


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_weights_of_any_float_dtype_become_float32(tmp_path, kind):
    params = {name: array.astype(kind) for name, array in params_of(golden(tmp_path)).items()}
    found = read_source(str(write_checkpoint(tmp_path / "a.pkl", params, flags())), ViTOptions()).state
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_an_encoder_without_decoder_weights_has_the_decoder_size_of_its_flags(tmp_path):
    arrays = params_of(golden(tmp_path))
    encoder = {
        name: array for name, array in arrays.items() if not name.startswith(("decoder", "image_mask", "text_mask"))
    }
    for options, width in (({}, 512), ({"m3ae.dec_emb_dim": 48}, 48)):
        c = read_source(str(write_checkpoint(tmp_path / "a.pkl", encoder, flags(**options))), ViTOptions()).config
        assert (c.dec_emb_dim, c.dec_depth, c.dec_num_heads, c.output_head_depth) == (width, 8, 2, 0)


@pytest.mark.slow
def test_a_published_size_has_its_number_of_heads_regardless_of_the_flag(tmp_path):
    arrays = params_of(golden(tmp_path, emb_dim=48, dec_emb_dim=32))
    path = write_checkpoint(tmp_path / "a.pkl", arrays, flags(**{"m3ae.model_type": "huge"}))
    config = read_source(str(path), ViTOptions()).config
    assert (config.num_heads, config.dec_num_heads) == (16, 16)


@pytest.mark.slow
def test_the_encoder_of_a_fine_tuned_classifier_is_imported(tmp_path):
    arrays = params_of(golden(tmp_path))
    encoder = {name: array for name, array in arrays.items() if not name.startswith("decoder")}
    tuned = {f"base_model/{name}": array for name, array in encoder.items()} | {"Dense_0/bias": np.zeros(5, np.float32)}
    found = read_source(str(write_checkpoint(tmp_path / "a.pkl", tuned, flags())), ViTOptions())
    np.testing.assert_array_equal(found.state["encoder.norm.weight"], arrays["encoder/LayerNorm_0/scale"])
    assert not any(name.startswith("decoder") for name in found.state)


def test_the_tokenizer_is_copied_with_the_weights(tmp_path, capsys):
    tokenizer = train_tokenizer([caption(i) for i in range(40)], 60)
    tokenizer.save(str(tmp_path / "words.json"))
    with np.load(make_golden(tmp_path / "golden.npz", vocab=tokenizer.get_vocab_size())) as file:
        write_checkpoint(tmp_path / "a.pkl", params_of({key: file[key] for key in file.files}), flags())
    command = [str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "words.json")]
    assert main(command[:3]) == 0 and "the weights contain no tokenizer: add --tokenizer" in capsys.readouterr().out
    assert main(command) == 0 and "contain no tokenizer" not in capsys.readouterr().out
    words = M3AE.from_pretrained(tmp_path / "out").tokenizer
    assert words is not None and words.max_length == 7
    np.testing.assert_array_equal(
        words.encode(caption(3)), tokenizer.encode(caption(3), add_special_tokens=False).ids[:7]
    )


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags())
    train_tokenizer([caption(i) for i in range(40)], 60).save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"tokens but model\.vocab_size is 29"):
        main([str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "words.json")])
    assert not (tmp_path / "out").exists()


def hostile(tmp_path):
    saved = {"step": 1, "variant": flags(), "state": Call(exec, "open('PWNED', 'w').close()")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(saved))


def truncated(tmp_path):
    path = write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags())
    path.write_bytes(path.read_bytes()[:-5000])


def empty(tmp_path):
    (tmp_path / "a.pkl").touch()


def folder(tmp_path):
    (tmp_path / "a.pkl").mkdir()


def another_pickle(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weights": np.zeros(3)}))


def linear_probe(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", {"Dense_0/kernel": np.zeros((3, 2), np.float32)}, flags())


def wrong_shape(tmp_path):
    params = params_of(golden(tmp_path))
    params["encoder/Block_1/Attention_0/Dense_1/kernel"] = np.zeros((24, 25), np.float32)
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def missing(tmp_path):
    params = params_of(golden(tmp_path))
    del params["decoder/LayerNorm_0/scale"]
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def unknown(tmp_path):
    params = params_of(golden(tmp_path)) | {"register_tokens": np.zeros((1, 4, 24), np.float32)}
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def not_finite(tmp_path):
    params = params_of(golden(tmp_path))
    params["cls_token"][0, 0, 3] = np.nan
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def object_flag(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags(**{"m3ae.num_heads": {1: 2}}))


def endless(tmp_path):
    params = params_of(golden(tmp_path))
    kept = {path: array for path, array in params.items() if not path.startswith(("decoder", "image_mask"))}
    write_checkpoint(tmp_path / "a.pkl", kept, flags(**{"m3ae.dec_emb_dim": 10**13}))


def integers(tmp_path):
    params = params_of(golden(tmp_path))
    params["encoder/LayerNorm_0/scale"] = np.ones(24, np.int32)
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def no_axis(tmp_path):
    params = params_of(golden(tmp_path)) | {"encoder/LayerNorm_0/scale": np.array(1, np.float32)}
    write_checkpoint(tmp_path / "a.pkl", params, flags())


def no_heads(tmp_path):
    kept = {name: value for name, value in flags().items() if not name.endswith("num_heads")}
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), kept)


def unknown_size(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags(**{"m3ae.model_type": "giant"}))


def unknown_normalisation(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags(**{"data.custom_image_mean": "a-b-c"}))


def vqgan_targets(tmp_path):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags(discretized_image=True))


MISTAKES = {
    hostile: "its state is a call of builtins.exec, which was not run",
    truncated: "it is damaged",
    empty: "is empty",
    folder: "neither checkpoints nor an exported model",
    another_pickle: "a pickle without 'state' and 'variant'",
    linear_probe: "contains no M3AE encoder, but the parameters Dense_0/kernel",
    wrong_shape: "encoder.blocks.1.attn.proj.weight has shape [25, 24], but the model config expects [24, 24]",
    missing: "lacks the parameter decoder/LayerNorm_0/scale",
    unknown: "has a parameter register_tokens, which an M3AE cannot represent",
    not_finite: "encoder_input.cls_token is not finite",
    object_flag: "num_heads",
    endless: "dec_emb_dim",
    integers: "encoder/LayerNorm_0/scale must be an array of floats, but is an array of int32 with shape (",
    no_axis: "encoder/LayerNorm_0/scale must be an array of floats, but is an array of float32 with shape ()",
    no_heads: "lack the number of heads",
    unknown_size: "the official code has no model_type 'giant'",
    unknown_normalisation: "its image normalisation 'custom' cannot be read",
    vqgan_targets: "ids of an image tokenizer",
}


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__)
def test_invalid_input_is_reported_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = set(os.listdir(tmp_path))
    with pytest.raises(UserError) as caught:
        main(["a.pkl", "--out", "out"])
    assert MISTAKES[make] in str(caught.value) and "\n" not in str(caught.value)
    assert "a.pkl" in str(caught.value) and set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("content", ["notes.txt", "model.safetensors"])
def test_a_folder_with_other_content_is_not_overwritten(tmp_path, content):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / content).write_text("mine")
    with pytest.raises(UserError, match="already contains"):
        main([str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out")])
    assert os.listdir(tmp_path / "out") == [content] and (tmp_path / "out" / content).read_text() == "mine"


def test_earlier_output_is_either_replaced_or_kept_complete(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pkl", params_of(golden(tmp_path)), flags())
    command = [str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out")]
    main(command)
    main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("m3ae_fast.base.output_folder.save_file", full)
    with pytest.raises(UserError, match="cannot be written"):
        main(command)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".*out*"))
