"""Heads, LARS and layer-wise learning rates equal the official ones."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from m3ae_fast.cli.verify import main
from m3ae_fast.evaluation.finetune_groups import layer_decay_groups, layer_of
from m3ae_fast.heads.modules import FineTuneHead, LinearProbeHead
from m3ae_fast.heads.stacked_optimizers import LARS, AdamW
from m3ae_fast.verify.finetune import flax_path
from m3ae_fast.verify.golden import Golden, relative_error
from m3ae_fast.verify.replay import quantities
from tests.helpers.official_transfer import make_finetuning, make_probe

VARIANTS = {
    "published": {"global_pool": False, "lr_peak_value": 0.1, "weight_decay": 0.0},
    "mean": {"global_pool": True, "lr_peak_value": 80.0, "weight_decay": 1e-2},
}
FINE_TUNINGS = {
    "cls": {},
    "mean-without-types": {"global_pool": True, "types": False, "depth": 1},
    "deep": {"depth": 5, "emb_dim": 16, "num_heads": 2, "mlp_ratio": 1.5, "layer_decay": 0.8, "patch": 8},
    "one-sample": {"classes": 2, "batch": 1},
}


def agree(file, minimum):
    found = list(quantities(Golden.load(file), torch.device("cpu"), torch.float32))
    assert len(found) >= minimum
    for name, ours, official, tolerance in found:
        assert relative_error(ours, official) <= tolerance, name
    return {name for name, *_ in found}


@pytest.mark.parametrize("sizes", [{}, {"classes": 11, "dim": 40, "batch": 3, "tokens": 2, "epochs": 5}])
def test_linear_probes_of_any_size_equal_the_official_ones(tmp_path, sizes):
    file = make_probe(tmp_path / "probe.npz", VARIANTS, **sizes)
    names = agree(file, 40)
    wanted = {key.replace("/", " ") for key in np.load(file).files if key.split("/")[0] in VARIANTS}
    wanted = {
        name.replace("grad0", "grad").replace("after_", "after ").replace("trace_end", "momentum") for name in wanted
    }
    assert {name for name in wanted if " init " not in name} <= names


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_fine_tuning_of_any_size_equals_the_official_code(tmp_path, name):
    file = make_finetuning(tmp_path / "finetune.npz", **FINE_TUNINGS[name])
    names = agree(file, 60)
    for key in np.load(file).files:  # everything is compared except the decoder, which our classifier does not have
        group, _, rest = key.partition("/")
        wanted = {
            "out": rest,
            "grads": f"grad {rest}",
            "params_after": f"after {rest}",
            "params_after_decay": f"after with decay {rest}",
        }.get(group)
        assert wanted is None or wanted in names or "decoder" in key or "mask_embedding" in key, key


@pytest.mark.parametrize(("make", "key"), [(make_probe, "mean/after_9/var"), (make_finetuning, "out/logits")])
def test_verify_finds_a_changed_value(tmp_path, capsys, make, key):
    file = make(tmp_path / "good.npz", *([VARIANTS] if make is make_probe else []))
    assert main([str(file)]) == 0
    arrays = dict(np.load(file))
    arrays[key] = arrays[key] * 1.0001
    np.savez(tmp_path / "bent.npz", **arrays)
    capsys.readouterr()
    assert main([str(tmp_path / "bent.npz")]) == 1
    assert len([line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]) == 1


@pytest.mark.parametrize("left", [6, 3, 0])
def test_the_parameters_of_a_probe_are_compared_at_the_recorded_steps(tmp_path, left):
    """The last step, 9, need not be among the recorded steps."""
    file = make_probe(tmp_path / "probe.npz", VARIANTS)
    arrays = dict(np.load(file))
    kept = {k: a for k, a in arrays.items() if "/after_" not in k or int(k.split("after_")[1][0]) <= left}
    np.savez(file, **kept)
    names = agree(file, 15)
    assert ("mean change kernel" in names) == (left > 0) and "mean momentum kernel" in names
    assert "mean after 9 kernel" not in names and ("mean after 3 kernel" in names) == (left > 0)


def test_a_golden_file_of_fine_tuning_without_steps_is_compared_without_its_steps(tmp_path):
    file = make_finetuning(tmp_path / "finetune.npz")
    arrays = dict(np.load(file))
    meta = json.loads(arrays["meta"].tobytes())
    meta |= {"steps": 0, "lr_by_layer": {layer: [] for layer in meta["lr_by_layer"]}}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    for key, array in arrays.items():
        if "trajectory" in key:
            arrays[key] = array[:0]
        elif key.startswith("params_after"):
            arrays[key] = arrays[f"params/{key.partition('/')[2]}"]
    np.savez(file, **arrays)
    assert "loss_trajectory" in agree(file, 60)


def test_every_parameter_has_exactly_one_weight_decay_and_layer_wise_learning_rate(tmp_path):
    from m3ae_fast.verify.finetune import build_classifier

    golden = Golden.load(make_finetuning(tmp_path / "finetune.npz"))
    model, m = build_classifier(golden), golden.meta
    groups = layer_decay_groups(model, m["depth"], 0.3, 0.5)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    decayed = {flax_path(name) for name, p in model.named_parameters() if found[id(p)]["weight_decay"] == 0.3}
    assert decayed == {path for path in m["decayed_if_the_mask_worked"] if "decoder" not in path}
    for name, p in model.named_parameters():
        assert found[id(p)]["lr_scale"] == 0.5 ** (m["depth"] + 1 - m["layer_id"][flax_path(name)])


def test_layer_ids_of_text_parameters_equal_the_official_ones():
    assert layer_of("backbone.encoder_input.text_embedding", 3) == 4
    assert layer_of("backbone.encoder_input.text_type", 3) == 4
    assert layer_of("backbone.encoder.blocks.12.mlp.fc1.weight", 24) == 13


def test_lars_does_not_scale_updates_of_zero_norm():
    p = nn.Parameter(torch.zeros(1, 3))
    optimizer = LARS([p], lr=0.5, momentum=0.0)
    p.grad = torch.tensor([[1.0, -2.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([[-0.5, 1.0, 0.0]]))
    p.grad = torch.zeros(1, 3)
    optimizer.step()
    assert p.isfinite().all()


def test_each_head_of_a_stack_is_updated_as_if_it_were_trained_separately():
    """Each head is compared with a head trained alone: by torch's AdamW, and by LARS on a stack of one head."""
    torch.manual_seed(0)
    begun, rates, gradients = torch.randn(3, 4, 5), torch.tensor([0.1, 0.01, 0.0]), torch.randn(6, 3, 4, 5)
    for kind, judge in ((AdamW, torch.optim.AdamW), (LARS, LARS)):
        stack = nn.Parameter(begun.clone())
        optimizer = kind([stack], weight_decay=0.1)
        alone = [nn.Parameter(begun[number : number + 1].clone()) for number in range(3)]
        judges = [judge([p], lr=rate, weight_decay=0.1) for p, rate in zip(alone, rates.tolist())]
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = rates / (1 + step)
            stack.grad = gradient
            optimizer.step()
            for number, (p, own) in enumerate(zip(alone, judges)):
                own.param_groups[0]["lr"] = rates[number].item() / (1 + step)
                p.grad = gradient[number : number + 1]
                own.step()
        torch.testing.assert_close(stack.data, torch.cat([p.data for p in alone]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LinearProbeHead, FineTuneHead])
def test_heads_are_initialised_as_in_flax(kind):
    torch.manual_seed(0)
    head = kind(400, 200)
    std = 400**-0.5
    assert head.linear.bias.eq(0).all()
    assert abs(head.linear.weight.std().item() / std - 1) < 0.02
    assert head.linear.weight.abs().max() <= 2 * std / 0.8796 * 1.001
