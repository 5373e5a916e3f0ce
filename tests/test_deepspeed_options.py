"""No setting of the deepspeed section changes the loss curves, the checkpoints, or how a run resumes."""

import json
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from m3ae_kernels.cpu.linear import linear

from m3ae_fast.base.errors import UserError
from m3ae_fast.engine import deepspeed_engine
from m3ae_fast.model import transformer
from m3ae_fast.process.ranks import join_ranks
from tests.helpers.option_cases import HALF, STAGE, cases, settings
from tests.helpers.ranks import run_ranks
from tests.helpers.zero_cases import config_of, deepspeed_engine_of, engine_of, take

pytestmark = pytest.mark.slow


def test_every_deepspeed_setting_has_a_test_case():
    tried = {name for _, change, _ in cases(3) for name in change}
    assert tried | {STAGE} == settings().keys()


def test_a_run_with_any_deepspeed_setting_resumes_on_other_ranks_and_in_plain_torch(tmp_path):
    """Three ranks save a checkpoint, from which two ranks and one rank continue. The losses and gradient norms equal
    those of the uninterrupted run and those of a run with an empty section, except for rounding errors, which are
    larger if gradients are reduced in bf16."""
    curves = {}
    for what, ranks in (("save", 3), ("resume", 2), ("resume-plain", 1)):
        code, out = run_ranks("tests.helpers.option_cases", [what, str(tmp_path)], ranks, tmp_path / f"{what}.log")
        assert code == 0, out[-3000:]
        curves[what] = json.loads((tmp_path / f"{what}.json").read_text())
    whole = {name: np.array(curve) for name, curve in curves["save"].items()}
    usual = whole["stage=0 {}"]
    assert len(whole) == len(list(cases(3))) and np.ptp(usual[:, 0]) > 0.3  # the loss changes
    for name, curve in whole.items():
        rounding = 3e-3 if "bf16" in name else 1e-6
        np.testing.assert_allclose(curve, usual, rtol=rounding, err_msg=name)
        for what in ("resume", "resume-plain"):
            np.testing.assert_allclose(
                np.array(curves[what][name]), curve[HALF:], rtol=rounding, err_msg=f"{name} {what}"
            )


def test_settings_that_deepspeed_refuses_are_reported_in_one_line(monkeypatch):
    import deepspeed

    def refuse(**_):
        raise AssertionError("no such\noption")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with join_ranks() as ranks, pytest.raises(UserError, match="rejects the deepspeed section: no such option"):
        deepspeed_engine_of(ranks, config_of(1, 1, 1, "fp32", {}))


def test_deepspeed_works_in_each_stage_of_a_program():
    for _ in range(2):
        with join_ranks() as ranks:
            deepspeed_engine_of(ranks, config_of(1, 1, 1, "fp32", {}))


def test_the_last_block_computes_only_the_queries_that_it_needs_at_every_stage(monkeypatch):
    """At stage 3, DeepSpeed installs hooks on the layer. They must not be mistaken for hooks of a user, because a layer
    with such hooks computes all queries."""
    rows: list[int] = []

    def counted(x, weight, bias):
        rows.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(transformer, "linear", counted)
    found = []
    for stage in (None, 3):
        rows.clear()
        with join_ranks() as ranks:
            config = config_of(1, stage, 1, "fp32", {})
            take(ranks, engine_of(ranks, config), config, range(1))
        found.append(list(rows))
    # a product for the queries, and one for the keys and values, of the decoder's last block
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.comm.torch", "build_shm_op"),
        ("deepspeed.runtime.bf16_optimizer", "is_invalid_grad_norm"),
        ("deepspeed.runtime.zero.stage_1_and_2", "is_invalid_grad_norm"),
        ("deepspeed.runtime.bf16_optimizer", "clip_tensors_by_global_norm"),
    ],
)
def test_a_private_name_that_deepspeed_no_longer_has_is_an_error(monkeypatch, module, name):
    """The engine replaces the attribute of this name. If DeepSpeed no longer used it, the replacement would silently
    have no effect."""
    monkeypatch.delattr(import_module(module), name)
    with join_ranks() as ranks, pytest.raises(UserError, match=rf"^DeepSpeed [\d.]+ has no {module}.{name}, which"):
        deepspeed_engine_of(ranks, config_of(1, 1, 1, "fp32", {}))


@pytest.mark.parametrize("missing", ["independent_gradient_partition_epilogue", "reduction_stream"])
def test_a_private_name_that_deepspeeds_optimiser_no_longer_has_is_an_error(missing):
    names = {"independent_gradient_partition_epilogue", "reduction_stream"} - {missing}
    optimizer = SimpleNamespace(**dict.fromkeys(names))
    with pytest.raises(UserError, match=rf"has no SimpleNamespace\.{missing}, which"):
        deepspeed_engine._wait_for_one_stream(optimizer)
