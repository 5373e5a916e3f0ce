"""Layer-wise learning rates in pre-training: the rate of each parameter, settings that are rejected, and resuming on
another number of ranks.

test_engine_parity.py compares the loss curves of runs with such rates at all ZeRO stages. heads/test_heads.py tests the
layer-wise learning rates of fine-tuning."""

import json
import shutil

import numpy as np
import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import Config, ModelConfig, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.parameter_groups import optimizer_groups
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.pretraining.automatic_settings import check_overrides
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training.user_warnings import open_options
from tests.helpers.checkpoints import changes_of
from tests.helpers.trainer import TINY, zero
from tests.test_model import MIXED
from tests.test_model import TINY as SMALL

DECAY = 0.5


def config(decay: float = DECAY, **sections) -> Config:
    data = json.loads(json.dumps(TINY))
    data["model"] |= {"init_from": "start"} | sections.pop("model", {})
    data["optim"] |= {"layer_decay": decay, "weight_decay": 0.3} | sections.pop("optim", {})
    data["train"] |= {"global_batch": 6, "micro_batch": 3}
    return parse(Config, data | sections, "test")


def scale(name: str, depth: int) -> float:
    """Return the expected factor of the learning rate of a parameter."""
    if name.startswith("encoder.blocks."):
        return DECAY ** (depth - int(name.split(".")[2]))
    return DECAY ** (depth + 1) if name.startswith(("patch_embed.", "encoder_input.")) else 1.0


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_each_layer_is_updated_with_its_own_learning_rate(attention):
    """AdamW's change of a weight, including the weight decay, is proportional to the learning rate."""
    changes = []
    with join_ranks() as ranks:
        for decay in (1.0, DECAY):
            torch.manual_seed(0)
            model = M3AE(SMALL.model_copy(update={"dec_attention": attention}))
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            engine = build_engine(model, config(decay), ranks)
            batch = pack(MIXED, model.geometry)
            engine.step([batch], batch.counts, 0.01)
            changes.append({name: after - before[name] for name, after in engine.whole("model").items()})
    assert {scale(name, SMALL.depth) for name in changes[0]} == {DECAY**n for n in range(SMALL.depth + 2)}
    for name, whole in changes[0].items():
        assert whole.any(), name
        torch.testing.assert_close(changes[1][name], scale(name, SMALL.depth) * whole, rtol=1e-3, atol=1e-7, msg=name)


def test_without_layer_decay_the_parameter_groups_are_the_two_of_the_official_code():
    model = M3AE(SMALL)
    decayed, others = optimizer_groups(model, config(1.0).optim)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {decayed["lr_scale"], others["lr_scale"]} == {1.0}
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == [name for name in names.values() if name.endswith(".weight")]
    layered = optimizer_groups(model, config().optim)
    assert len(layered) == 2 * (SMALL.depth + 2) and sum(len(group["params"]) for group in layered) == len(names)


def test_layer_decay_without_initial_weights_or_with_muon_is_an_error():
    with pytest.raises(
        UserError, match=r"layer_decay 0\.5 needs a run that starts from trained weights: set model\.in"
    ):
        config(model={"init_from": None})
    with pytest.raises(
        UserError, match=r"optim\.layer_decay 0\.5 cannot be combined with Muon, .*: set optim\.name to"
    ):
        config(optim={"name": "muon"})
    with pytest.raises(UserError, match="layer_decay"):
        config(1.5)
    config(1.0, model={"init_from": None}, optim={"name": "muon"})


def test_pretrain_accepts_layer_decay_only_with_initial_weights():
    assert check_overrides(["optim.layer_decay=0.5"], "runs/base").optim.layer_decay == 0.5
    with pytest.raises(UserError, match=r"optim\.layer_decay 0\.5 needs a run .* \(with pretrain: --from MODEL\)"):
        check_overrides(["optim.layer_decay=0.5"])


def test_settings_without_a_counterpart_in_the_official_code_are_reported_as_open():
    assert open_options(config(1.0)) == ""
    assert open_options(config()).startswith("Open: optim.layer_decay=0.5; ")


def test_a_changed_layer_decay_is_reported_when_a_run_is_resumed(tmp_path):
    saved = config(1.0).model_dump(mode="json")
    info = checkpoint.Info(1, 0, 42, saved, {})
    assert changes_of(tmp_path, info, config(1.0), {}) == []
    (note,) = changes_of(tmp_path, info, config(), {})
    assert "optim.layer_decay" in note


@pytest.mark.slow
def test_resume_on_other_ranks_and_stage(trainer):
    M3AE(parse(ModelConfig, TINY["model"], "test")).save_pretrained(trainer.folder / "start")
    given = {"model.init_from": trainer.folder / "start", "optim.layer_decay": DECAY, "train.save_every": 2}
    options = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    out = trainer("run", *zero(3), *options, ranks=2)
    assert "; multiplied by 0.125 in the embeddings (optim.layer_decay)" in out and "Open: optim.layer_decay=0.5" in out
    whole = np.array(trainer.losses("run"))
    for path in checkpoint.saved_steps(trainer.folder / "run"):
        if checkpoint.step_of(path) > 4:
            shutil.rmtree(path)
    shutil.rmtree(trainer.folder / "start")  # a run that has a checkpoint does not need it
    trainer("run", *zero(None), *options, "--resume", "auto")
    np.testing.assert_allclose(np.array(trainer.losses("run")), whole, rtol=2e-5)
