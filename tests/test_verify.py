"""The model equals the official one, which is tested by replaying golden files."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.batch import pack
from m3ae_fast.cli.verify import main
from m3ae_fast.config import LossConfig
from m3ae_fast.engine.parameter_groups import parameter_groups
from m3ae_fast.model import M3AE
from m3ae_fast.verify.golden import Golden, flax_name, relative_error
from m3ae_fast.verify.replay import quantities
from tests.helpers.official import Official, make_golden

pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden_files_are_reproduced(file):
    golden = Golden.load(file)
    names = set()
    for name, ours, official, tolerance in quantities(golden, torch.device("cpu"), torch.float32):
        names.add(name)
        assert relative_error(ours, official) <= tolerance, name
    arrays = {key.split("/")[0] for key in golden.arrays}
    assert arrays == {"params", "in", "out", "grads", "params_after"}
    for key in golden.arrays:  # all values that the official model computed are compared
        group, _, rest = key.partition("/")
        wanted = {"out": rest, "grads": f"grad {rest}", "params_after": f"after {rest}"}.get(group)
        assert wanted is None or wanted in names, key


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_reference_implementation_reproduces_the_golden_files_of_the_official_code(file):
    """The reference that writes the other golden files agrees with a file written by the official code."""
    golden = Golden.load(file)
    ours = Official(golden.meta, golden.arrays).arrays()
    given = {key: a for key, a in golden.arrays.items() if key.split("/")[0] in ("out", "grads", "params_after")}
    assert ours.keys() == given.keys()
    for key, array in given.items():
        if key in ("out/encoder_text", "out/text_output", "out/representation"):
            continue  # padded positions have no meaning; the losses cover the other positions
        if key.endswith("Attention_0/Dense_0/bias"):
            continue  # a third of this bias belongs to the keys, whose gradient is only rounding error
        assert relative_error(ours[key], torch.from_numpy(array)) < 2e-5, key


OTHER_SIZES = {
    "ratios-of-1": {"config": {"image_mask_ratio": 1.0, "text_mask_ratio": 1.0}},
    "ratios-of-0": {"config": {"image_mask_ratio": 0.0, "text_mask_ratio": 0.0}, "all_token_loss": True},
    "odd-ratios": {"config": {"image_mask_ratio": 0.37, "text_mask_ratio": 0.9}, "image_size": 30, "patch": 6},
    "one-patch": {"image_size": 16, "patch": 16, "text_len": 1, "lengths": (0, 1, 1)},
    "pixels-as-patches": {"image_size": 4, "patch": 1, "config": {"mlp_ratio": 2.5, "num_heads": 24}},
    "no-types": {"config": {"use_type_embedding": False, "depth": 1, "dec_depth": 4}},
    "head-of-1": {"config": {"output_head_depth": 1}, "vocab": 1},
    "head-of-3": {"config": {"output_head_depth": 3}, "all_token_loss": True, "batch": 1, "lengths": (5,)},
    "clipped": {"clip_gradient": 1e-3, "steps": 4, "lr": 1e-2, "weight_decay": 0.5},
    "images": {"kinds": ("image",), "config": {"image_mask_ratio": 0.5, "emb_dim": 68, "num_heads": 17}},
    "texts": {"kinds": ("text",), "text_len": 33, "lengths": (33, 20, 1), "vocab": 3001},
    "empty-texts": {"kinds": ("text",), "lengths": (0,)},
    "weights": {"image_loss_weight": 0.0, "text_loss_weight": 3.0},
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_golden_files_of_other_sizes_are_reproduced(tmp_path, name):
    golden = Golden.load(make_golden(tmp_path / "golden.npz", **OTHER_SIZES[name]))
    for quantity, ours, official, tolerance in quantities(golden, torch.device("cpu"), torch.float32):
        assert relative_error(ours, official) <= tolerance, quantity


def test_exit_codes(tmp_path, capsys):
    assert main([str(FILES[0])]) == 0
    assert "of 1 file agree" in capsys.readouterr().out.splitlines()[-1]
    arrays = dict(np.load(FILES[0]))
    arrays["grads/encoder/LayerNorm_0/scale"] *= 1.001
    np.savez(tmp_path / "bent.npz", **arrays)
    assert main([str(FILES[0]), str(tmp_path / "bent.npz")]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if "FAIL" in line]
    assert len(failed) == 1 and "grad encoder/LayerNorm_0/scale" in failed[0]


def test_verify_fails_on_nan(tmp_path):
    arrays = dict(np.load(FILES[0]))
    arrays["out/loss"] = np.float32("nan")
    np.savez(tmp_path / "nan.npz", **arrays)
    assert main([str(tmp_path / "nan.npz")]) == 1


def test_gradient_clipping_equals_that_of_optax(tmp_path):
    """A small clip_gradient scales the gradients of the first step. If clipping were different from that of optax, the
    parameters after this step would be different."""
    golden = Golden.load(next(f for f in FILES if f.stem == "paired"))
    golden.meta |= {"clip_gradient": 0.01, "steps": 1}
    after = [
        (n, o, g) for n, o, g, _ in quantities(golden, torch.device("cpu"), torch.float32) if n.startswith("after")
    ]
    norm = sum(float((g**2).sum()) for k, g in golden.arrays.items() if k.startswith("grads/")) ** 0.5
    for name, ours, _ in after:
        path = name.removeprefix("after ")
        if path.endswith("Attention_0/Dense_0/bias"):
            continue
        p, grad = (golden.arrays[f"{group}/{path}"] for group in ("params", "grads"))
        grad = grad * min(1, 0.01 / norm)
        decay = golden.meta["weight_decay"] * (path in golden.meta["decayed"])
        expected = p - golden.meta["lr"] * (grad / (np.abs(grad) + golden.meta["adam_eps"]) + decay * p)
        expected = torch.from_numpy(expected)
        expected = expected.T if path.endswith("kernel") else expected.reshape(ours.shape)
        assert relative_error(ours, expected) < 2e-4, name


def test_verify_reports_invalid_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Golden.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="not a golden file"):
        Golden.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not a golden file"):
        Golden.load(tmp_path / "other.npz")
    shutil.copy(FILES[0], tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes(FILES[0].read_bytes()[:5000])
    with pytest.raises(UserError, match="not a golden file"):
        Golden.load(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("params/cls_token", None, "params/cls_token"),
        ("params/cls_token", np.zeros((3, 3)), "size"),
        ("in/text", np.full((4, 12), 10**6), "out of range"),
        ("in/text_padding_mask", np.eye(12)[:4], "padding must follow the text tokens"),
        ("meta", lambda meta: {}, "config"),
        ("meta", lambda meta: meta | {"lr": 10**400}, "too large"),
        ("meta", lambda meta: meta | {"config": meta["config"] | {"image_mask_ratio": -math.inf}}, "infinity"),
    ],
)
def test_files_that_cannot_be_replayed(tmp_path, capsys, key, value, message):
    arrays = dict(np.load(next(f for f in FILES if f.stem == "paired")))
    if value is None:
        del arrays[key]
    elif key == "meta":
        meta = value(json.loads(arrays["meta"].tobytes()))
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    else:
        arrays[key] = value
    file = tmp_path / "[/odd].npz"  # the name looks like markup
    file.parent.mkdir()
    np.savez(file, **arrays)
    assert exit_cleanly(lambda: main([str(file)])) == 2
    error = capsys.readouterr().err
    assert "cannot be replayed" in error and message in error and error.count("\n") == 1


def test_verify_fails_if_an_array_has_another_shape(tmp_path):
    arrays = dict(np.load(FILES[0]))
    arrays["out/loss_trajectory"] = arrays["out/loss_trajectory"][:-1]
    np.savez(tmp_path / "short.npz", **arrays)
    assert main([str(tmp_path / "short.npz")]) == 1


def test_every_parameter_has_its_flax_name():
    for file in FILES:
        golden = Golden.load(file)
        depth = golden.meta["config"]["output_head_depth"]
        ours = {flax_name(name, depth) for name, _ in golden.build_model().named_parameters()}
        assert ours == {key.removeprefix("params/") for key in golden.arrays if key.startswith("params/")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_weight_decay_groups_equal_the_official_ones(file):
    """mae.npz is from the official MAE, which exempts the encoder's type embedding from weight decay, but not the
    decoder's."""
    golden = Golden.load(file)
    model = golden.build_model()
    decayed = {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
    depth = golden.meta["config"]["output_head_depth"]
    names = {flax_name(name, depth) for name, p in model.named_parameters() if id(p) in decayed}
    assert sorted(names) == sorted(golden.meta["decayed"])
    assert json.dumps(golden.meta["no_decay"])  # the list with which the official code compares the parts of paths


@pytest.mark.parametrize("everywhere", ["image", "text"])
def test_computing_the_loss_of_one_modality_on_all_tokens_does_not_change_that_of_the_other(tmp_path, everywhere):
    """Here, the two settings are changed one at a time, although the official code has one flag for both."""
    official = {
        flag: Golden.load(make_golden(tmp_path / f"{flag}.npz", all_token_loss=flag, seed=4)) for flag in (False, True)
    }
    golden = official[False]
    plain = golden.build_model(torch.float32)
    loss = LossConfig(image_all_tokens=everywhere == "image", text_all_tokens=everywhere == "text")
    model = M3AE(plain.config, loss)
    golden.load_parameters(model, golden.flax_path)
    losses = model(pack(golden.samples(), model.geometry))
    for kind in ("image", "text"):
        expected = official[kind == everywhere].arrays[f"out/{kind}_loss"]
        assert getattr(losses, f"{kind}_loss").item() == pytest.approx(float(expected), rel=1e-5)
        other = official[kind != everywhere].arrays[f"out/{kind}_loss"]
        assert float(expected) != pytest.approx(float(other), rel=1e-3)
    weights = golden.meta["image_loss_weight"], golden.meta["text_loss_weight"]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(("image", "text"), [(2.0, 0.25), (0.5, 3.0)])
def test_each_loss_has_its_own_weight(tmp_path, image, text):
    golden = Golden.load(make_golden(tmp_path / "a.npz", image_loss_weight=image, text_loss_weight=text))
    model = golden.build_model(torch.float32)
    losses = model(pack(golden.samples(), model.geometry))
    assert losses.loss.item() == pytest.approx(float(golden.arrays["out/loss"]), rel=1e-5)
