"""Steps of plain torch's engine, compared with AdamW's formula in float64, and the saved state of an optimiser.

test_engine_parity.py compares DeepSpeed's steps with those of plain torch."""

import copy
import json

import pytest
import torch

from m3ae_fast.batch.packing import pack
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.config import Config, parse
from m3ae_fast.engine import optimizer
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.optimizer import collect, prime, set_lr
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from tests.helpers.trainer import TINY
from tests.test_model import MIXED
from tests.test_model import TINY as SMALL

RATES = (0.02, 0.0, 0.05, 0.01)


def config(clip_grad: float | None) -> Config:
    data = json.loads(json.dumps(TINY))
    data["optim"] |= {"betas": [0.8, 0.6], "weight_decay": 0.3, "clip_grad": clip_grad}
    data["train"] |= {"global_batch": 6, "micro_batch": 3}
    return parse(Config, data, "test")


def by_hand(model: M3AE, batches, counts, clip_grad: float | None) -> dict[str, torch.Tensor]:
    """Return the weights after steps with RATES. The gradients are computed by torch, and everything else in
    float64."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    for step, rate in enumerate(RATES, 1):
        model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
        model.zero_grad()
        sum(model(batch, counts).loss for batch in batches).backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        for name, gradient in gradients.items():
            gradient = gradient if clip_grad is None else gradient * min(1.0, clip_grad / norm.item())
            first, second = moments[name]
            first += 0.2 * (gradient - first)
            second += 0.4 * (gradient.square() - second)
            size = (second / (1 - 0.6**step)).sqrt() + 0.01
            decay = 0.3 if name.endswith(".weight") else 0.0
            weights[name] = weights[name] - rate * (first / (1 - 0.8**step) / size + decay * weights[name])
    return weights


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_optimiser_steps_follow_the_formula(clip_grad, monkeypatch):
    """Steps have two micro-batches and changing learning rates. A learning rate of 0 leaves the weights unchanged. With
    a large epsilon, rounding errors of gradients near 0 are not amplified."""
    monkeypatch.setattr(optimizer, "ADAM_EPS", 0.01)
    settings = config(clip_grad)
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model = M3AE(SMALL, settings.loss)
        batches = [pack(samples, model.geometry) for samples in (MIXED[:3], MIXED[3:])]
        counts = pack(MIXED, model.geometry).counts
        expected = by_hand(copy.deepcopy(model), batches, counts, clip_grad)
        engine = build_engine(model, settings, ranks)
        for rate in RATES:
            engine.step(batches, counts, rate)
        weights = engine.whole("model")
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name].double(), weight, rtol=2e-4, atol=2e-5)


def test_a_loaded_optimiser_state_continues_as_the_saved_one():
    """The whole state, including moments and the number of steps, is bitwise equal."""
    settings = config(0.1)
    with join_ranks() as ranks:
        torch.manual_seed(0)
        batch = pack(MIXED, M3AE(SMALL, settings.loss).geometry)
        one, other = (build_engine(M3AE(SMALL, settings.loss), settings, ranks) for _ in range(2))
        for rate in RATES[:3]:
            one.step([batch, batch], batch.counts, rate)
        saved = Staging().copy(one.fragments)
        other.load_state(3, lambda name, start, count: saved[name].data[start : start + count])
        for engine in (one, other):
            engine.step([batch, batch], batch.counts, 0.03)
        after, again = one.fragments(), other.fragments()
        assert all(torch.equal(after[name].data, again[name].data) for name in after)
        assert any(not torch.equal(after[name].data, saved[name].data) for name in after)


def test_priming_creates_the_optimiser_state_without_changing_parameters():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    p.grad = torch.randn(5)
    before = p.detach().clone(), p.grad.clone()
    optimizer = torch.optim.AdamW([{"params": [p], "lr_scale": 0.5}], lr=0.0, weight_decay=0.1, fused=True)
    set_lr(optimizer, 0.2)
    prime(optimizer, 7)
    assert torch.equal(p, before[0]) and torch.equal(p.grad, before[1])
    assert optimizer.param_groups[0]["lr"] == 0.1
    state = optimizer.state[p]
    assert state["step"] == 7 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_the_collected_state_is_a_copy_in_float32():
    model = torch.nn.Linear(3, 2).bfloat16()
    asked = []

    def whole(p, kind):
        asked.append(kind)
        return p

    found = collect(model, "ema", {"weight": ("ema",), "bias": ("exp_avg", "ema")}, whole)
    assert {name: (t.dtype, t.device.type) for name, t in found.items()} == {
        name: (torch.float32, "cpu") for name in ("weight", "bias")
    }
    before = found["weight"].clone()
    model.weight.data += 1
    assert torch.equal(found["weight"], before)
    # called once for each parameter with an average, because the call may involve all ranks
    assert asked == ["ema", "ema"]
