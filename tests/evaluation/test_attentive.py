"""The attentive probe is cross-attention with one query, and begins as a linear probe of the mean."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3ae_fast.config.evaluation import AttentiveProbeConfig, EvaluationConfig
from m3ae_fast.evaluation import attentive
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import AttentiveHead, LinearProbeHead
from m3ae_fast.evaluation.learning_rates import best, split
from m3ae_fast.evaluation.probe_engine import Setting
from m3ae_fast.evaluation.probes import PROBES
from m3ae_fast.process.ranks import join_ranks
from tests.evaluation.test_rates import _Pulse


def _tokens(samples, seed=0):
    return torch.randn(samples, 9, 24, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head():
    torch.manual_seed(0)
    return AttentiveHead(24, 5, 4).eval()


def test_it_pools_as_torchs_multi_head_attention_with_one_query(head):
    theirs = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    nn.init.normal_(head.query)
    nn.init.normal_(head.values.weight)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((torch.eye(24), head.keys.weight, head.values.weight)))
        theirs.out_proj.weight.copy_(torch.eye(24))
    tokens = _tokens(6)
    expected, _ = theirs(head.query.flatten().expand(6, 1, 24), tokens, tokens)
    torch.testing.assert_close(head.pool(tokens), expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alike", ["no keys", "equal tokens", "as it begins"])
def test_with_equal_keys_it_is_a_linear_probe_of_the_mean(head, alike):
    if alike != "as it begins":
        nn.init.normal_(head.query)
    if alike == "no keys":
        nn.init.zeros_(head.keys.weight)
    tokens = _tokens(6)
    if alike == "equal tokens":
        tokens = tokens[:, :1].expand(6, 9, 24)
    linear = LinearProbeHead(24, 5).eval()
    linear.load_state_dict(head.head.state_dict())
    torch.testing.assert_close(head.pool(tokens), tokens.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(tokens), linear(tokens.mean(1)), rtol=1e-5, atol=1e-5)


def _marked(samples, seed):
    """Samples in which one of the tokens, marked, says the class, and the others say another, which varies."""
    tokens, labels = 0.3 * _tokens(samples, seed), torch.arange(samples) % 5
    generator = torch.Generator().manual_seed(seed + 100)
    for row in range(samples):
        place = int(torch.randint(9, (1,), generator=generator))
        for other in range(9):
            said = int(labels[row]) if other == place else int(torch.randint(5, (1,), generator=generator))
            tokens[row, other, said] += 3
        tokens[row, place, 20] += 4
    return FeatureBank([f"a.tar/{i}" for i in range(samples)], tokens, labels, None, [])


def _setting(ranks):
    config = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}})
    return Setting(config, 5, 4, 3, ranks, _Pulse())


@pytest.mark.slow
def test_it_finds_the_token_that_tells_where_the_mean_does_not():
    given = {"data": {"train": [{"shards": "x"}]}, "attentive": {"batch": 64, "steps": 150}}
    config = EvaluationConfig.model_validate(given)
    bank, held_out = _marked(400, 0), _marked(200, 1)
    means = [FeatureBank(part.keys, part.features_RD.mean(1), part.labels_N, None, []) for part in (bank, held_out)]
    with join_ranks() as ranks:
        setting = Setting(config, 5, 4, 0, ranks, _Pulse())
        attends = PROBES["attentive"].predict(bank, held_out, setting).accuracies()["top1"]
        again = PROBES["attentive"].predict(bank, held_out, setting).accuracies()["top1"]
        linear = PROBES["linear"].predict(*means, setting).accuracies()["top1"]
    assert attends == again > 0.9 > linear + 0.2


def test_heads_of_several_rates_are_those_of_one_each():
    bank, config = _marked(60, 0), AttentiveProbeConfig(batch=16, steps=12, heads=2)
    with join_ranks() as ranks:
        both = attentive.train_heads(bank, config, (1e-3, 1e-2), _setting(ranks))
        alone = attentive.train_heads(bank, config, (1e-2,), _setting(ranks))[0].head
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, both[1].head.state_dict()[name])
    assert not torch.equal(both[0].head.head.linear.weight, alone.head.linear.weight)


def test_steps_are_adamws_on_the_cross_entropy_with_warm_up_and_cosine():
    bank, config = _marked(32, 0), AttentiveProbeConfig(batch=32, steps=18, heads=2, weight_decay=0.1)
    with join_ranks() as ranks:
        found = attentive.train_heads(bank, config, (1e-2,), _setting(ranks))[0].head
    torch.manual_seed(3)
    expected = AttentiveHead(24, 5, 2)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(18):
        factor = step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 16)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        F.cross_entropy(expected(bank.features_RD), bank.labels_N).backward()
        optimizer.step()
    torch.testing.assert_close(found.head.linear.weight, expected.head.linear.weight, rtol=1e-4, atol=1e-6)


def test_rates_are_tried_on_nine_tenths_and_judged_on_the_rest(monkeypatch):
    """And the head is then trained at the best of them, on all."""
    monkeypatch.setattr(attentive, "RATES", (1e-2, 3e-3, 1e-4))
    bank, config = _marked(60, 0), AttentiveProbeConfig(batch=16, steps=12, heads=2)
    train, held_out = split(bank)
    with join_ranks() as ranks:
        tried = attentive.try_rates(bank, config, _setting(ranks))
        for each, trained in zip(tried, attentive.train_heads(train, config, attentive.RATES, _setting(ranks))):
            with torch.no_grad():
                found = F.cross_entropy(trained.head(held_out.features_RD), held_out.labels_N)
            assert each.loss == pytest.approx(found.item())
        assert [each.peak_lr for each in tried] == [*attentive.RATES] and best(tried) != tried[-1]
        for given, count, rate in ((None, 60, best(tried).peak_lr), (3e-4, 60, 3e-4), (None, 9, 1e-3)):
            some = bank.rows(list(range(count)))
            fitted = attentive.fit(some, config.model_copy(update={"peak_lr": given}), _setting(ranks))
            expected = attentive.train_heads(some, config, (rate,), _setting(ranks))[0]
            assert torch.equal(fitted.head.head.linear.weight, expected.head.head.linear.weight)
            assert fitted.accuracies == expected.accuracies


def test_the_accuracy_of_a_step_is_that_before_it():
    bank, config = _marked(32, 0), AttentiveProbeConfig(batch=32, steps=2, heads=2)
    with join_ranks() as ranks:
        first, _ = attentive.train_heads(bank, config, (1e-2,), _setting(ranks))[0].accuracies
    torch.manual_seed(3)
    head = AttentiveHead(24, 5, 2)
    assert first == pytest.approx((head(bank.features_RD).argmax(1) == bank.labels_N).double().mean().item())


def test_what_is_open_follows_from_the_number_of_samples():
    found = attentive.settled(AttentiveProbeConfig(), 1000, 6)
    assert (found.batch, found.heads) == (256, 6)
    assert found.steps == math.ceil(334 * 1000 / 256)
    assert attentive.settled(AttentiveProbeConfig(batch=512, steps=7, heads=2), 100, 6).batch == 100


def test_short_and_unfinished_trainings_are_told():
    config = AttentiveProbeConfig(batch=100, steps=40, heads=2)
    rising = attentive.Trained(None, [0.02 * step for step in range(40)])
    few, still = attentive.cautions_of(rising, config)
    assert few == "only 40 steps: without attentive.steps, the run would take at least 1,000"
    assert still.startswith("training accuracy was still rising, by 20.0%; raise attentive.steps")
    long = AttentiveProbeConfig(batch=100, steps=1000, heads=2)
    assert attentive.cautions_of(attentive.Trained(None, [0.9] * 1000), long) == []
