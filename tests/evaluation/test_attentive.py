"""The attentive probe is cross-attention with one query, and begins as a linear probe of the mean. Linear heads are
trained with it."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.heads import probes
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import stored_steps
from m3ae_fast.heads.hyperparameter_choice import best, split
from m3ae_fast.heads.modules import AttentiveHeads, LinearHeads
from m3ae_fast.heads.probes import Trained, head_warnings, predict, train_heads
from m3ae_fast.heads.recipe import ATTENTIVE_RATES, Recipe
from m3ae_fast.process.ranks import join_ranks
from tests.heads.test_hyperparameter_choice import _Heartbeats


def _tokens(samples, seed=0):
    return torch.randn(samples, 9, 24, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head():
    return AttentiveHeads(24, 5, 4, [0]).eval()


def test_attentive_pooling_equals_torch_multi_head_attention_with_one_query(head):
    theirs = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    nn.init.normal_(head.query)
    nn.init.normal_(head.values)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((torch.eye(24), head.keys[0], head.values[0])))
        theirs.out_proj.weight.copy_(torch.eye(24))
    tokens = _tokens(6)
    expected, _ = theirs(head.query.flatten().expand(6, 1, 24), tokens, tokens)
    torch.testing.assert_close(head.pool(tokens)[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alike", ["no keys", "equal tokens", "as it begins"])
def test_with_equal_keys_the_attentive_probe_equals_a_linear_probe_of_the_mean(head, alike):
    if alike != "as it begins":
        nn.init.normal_(head.query)
    if alike == "no keys":
        nn.init.zeros_(head.keys)
    tokens = _tokens(6)
    if alike == "equal tokens":
        tokens = tokens[:, :1].expand(6, 9, 24)
    linear = LinearHeads(24, 5, [0]).eval()
    linear.linear.load_state_dict(head.linear.state_dict())
    torch.testing.assert_close(head.pool(tokens)[:, 0], tokens.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(tokens), linear(tokens.mean(1)), rtol=1e-5, atol=1e-5)


def test_padding_does_not_affect_the_pooling_of_an_image_with_fewer_patches(head):
    """An image with fewer patches is padded with zero rows."""
    nn.init.normal_(head.query)
    tokens = _tokens(6)
    torch.testing.assert_close(head.pool(F.pad(tokens, (0, 0, 0, 4))), head.pool(tokens))
    torch.testing.assert_close(head(F.pad(tokens, (0, 0, 0, 4))), head(tokens))


def _marked(samples, seed):
    """Return samples in which a marked token encodes the class, and each other token encodes a random class."""
    tokens, labels = 0.3 * _tokens(samples, seed), torch.arange(samples) % 5
    generator = torch.Generator().manual_seed(seed + 100)
    for row in range(samples):
        place = int(torch.randint(9, (1,), generator=generator))
        for other in range(9):
            encoded = int(labels[row]) if other == place else int(torch.randint(5, (1,), generator=generator))
            tokens[row, other, encoded] += 3
        tokens[row, place, 20] += 4
    return FeatureBank([f"a.tar/{i}" for i in range(samples)], tokens, labels, None, [])


def _means(bank):
    """Return a bank with the mean token of each sample."""
    return replace(bank, stored_SD=bank.features_RD.mean(1))


def _recipe(samples, seed=3, **attentive):
    config = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, "attentive": attentive})
    return Recipe.of("attentive", config, classes=5, samples=samples, encoder_heads=4, seed=seed)


def _trained(bank, ranks, **attentive):
    """Return the trained head and its log."""
    return train_heads({0: bank}, _recipe(len(bank.keys), **attentive), ranks, _Heartbeats())[0]


@pytest.mark.slow
def test_the_attentive_probe_finds_an_informative_token_that_the_mean_hides():
    bank, held_out = _marked(400, 0), _marked(200, 1)
    recipe = _recipe(400, seed=0, batch=64, steps=150)
    with join_ranks() as ranks:
        attends, again, linear = (
            predict({0: one}, {0: other}, recipe, ranks, _Heartbeats())[0].accuracies()["top1"]
            for one, other in ((bank, held_out), (bank, held_out), (_means(bank), _means(held_out)))
        )
    assert attends == again > 0.9 > linear + 0.2


def test_attentive_heads_trained_together_equal_those_trained_separately():
    bank, other = _marked(60, 0), _marked(60, 5)
    with join_ranks() as ranks:
        recipe = _recipe(60, batch=16, steps=12, heads=2)
        rates = {0: [1e-3, 1e-2], 1: [1e-2]}
        both, right = probes._fit({0: bank, 1: other}, recipe, rates, "", ranks, _Heartbeats())
        alone = _trained(bank, ranks, batch=16, steps=12, heads=2, peak_lr=1e-2)
    for name, tensor in alone.heads.state_dict().items():
        torch.testing.assert_close(both[0].heads.state_dict()[name][1:], tensor, rtol=1e-4, atol=1e-5)
    assert right[0][:, 1].tolist() == alone.accuracies != right[1][:, 0].tolist()
    assert not torch.allclose(both[0].heads.linear.weight[0], alone.heads.linear.weight[0])


def test_linear_and_attentive_heads_trained_in_one_pass_equal_those_trained_separately():
    tokens = _marked(60, 0)
    banks = {0: tokens, 1: _means(tokens)}
    with join_ranks("cpu") as ranks:
        recipe = _recipe(60, steps=20, batch=16)
        both = train_heads(banks, recipe, ranks, _Heartbeats())
        assert [type(each.heads) for each in both.values()] == [AttentiveHeads, LinearHeads]
        for number, bank in banks.items():
            alone = train_heads({number: bank}, recipe, ranks, _Heartbeats())[number]
            assert alone.peak_lr == both[number].peak_lr and len(alone.tried) == 5
            for name, tensor in alone.heads.state_dict().items():
                assert torch.equal(tensor, both[number].heads.state_dict()[name])


@pytest.mark.parametrize("linear", [False, True])
def test_heads_are_trained_by_adamw_on_the_cross_entropy_with_warm_up_and_cosine_decay(linear):
    """Each step has all samples, so their order does not matter."""
    bank = _means(_marked(32, 0)) if linear else _marked(32, 0)
    with join_ranks() as ranks:
        found = _trained(bank, ranks, batch=32, steps=18, heads=2, weight_decay=0.1, peak_lr=1e-2)
    expected = LinearHeads(24, 5, [3]) if linear else AttentiveHeads(24, 5, 2, [3])
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(18):
        factor = step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 16)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        logits = expected(bank.features_RD)[:, 0]
        if step == 0:
            right = (logits.argmax(1) == bank.labels_N).double().mean().item()
        F.cross_entropy(logits, bank.labels_N).backward()
        optimizer.step()
    torch.testing.assert_close(found.heads.linear.weight, expected.linear.weight, rtol=1e-4, atol=1e-6)
    assert found.accuracies[0] == pytest.approx(right), "the accuracy is that before the step"
    if linear:
        mean, var = bank.features_RD.mean(0), bank.features_RD.var(0, correction=0)
        torch.testing.assert_close(found.heads.norm.mean, (1 - 0.9**18) * mean)
        torch.testing.assert_close(found.heads.norm.var, (1 - 0.9**18) * var + 0.9**18)


def test_learning_rates_are_tried_on_nine_tenths_of_the_samples_and_compared_on_the_rest(monkeypatch):
    """The head is then trained with the best learning rate on all samples."""
    monkeypatch.setattr("m3ae_fast.heads.recipe.ATTENTIVE_RATES", (1e-2, 3e-3, 1e-4))
    bank, given = _marked(60, 0), {"batch": 16, "steps": 12, "heads": 2}
    train, held_out = (bank.rows(rows) for rows in split(bank))
    with join_ranks() as ranks:
        tried = probes.try_rates({0: bank}, _recipe(60, **given), ranks, _Heartbeats())[0]
        assert [each.value for each in tried] == [1e-2, 3e-3, 1e-4] and best(tried) != tried[-1]
        for each in tried:
            trained = _trained(train, ranks, **given, peak_lr=each.value)
            found = F.cross_entropy(probes.logits(trained.heads, held_out), held_out.labels_N)
            assert each.loss == pytest.approx(found.item(), rel=1e-4)
        for rate, count, expected in ((None, 60, best(tried).value), (3e-4, 60, 3e-4), (None, 9, 1e-3)):
            some = bank.rows(list(range(count)))
            fitted = _trained(some, ranks, **given, **({"peak_lr": rate} if rate else {}))
            alone = _trained(some, ranks, **given, peak_lr=expected)
            assert fitted.peak_lr == expected and fitted.accuracies == alone.accuracies
            assert torch.equal(fitted.heads.linear.weight, alone.heads.linear.weight)


def test_unset_hyper_parameters_follow_from_the_number_of_samples():
    found = _recipe(1000)
    assert (found.batch, found.attention_heads, found.rates) == (256, 4, ATTENTIVE_RATES)
    assert found.steps == math.ceil(334 * 1000 / 256)
    given = _recipe(100, batch=512, steps=7, heads=2, peak_lr=0.1)
    assert (given.batch, given.steps, given.attention_heads, given.rates) == (100, 7, 2, (0.1,))


def test_short_and_unfinished_trainings_are_reported():
    short, long = (_recipe(1000, batch=100, steps=steps) for steps in (40, 1000))
    few, still = head_warnings(Trained(None, [0.02 * step for step in range(40)], 1e-3, []), short)
    assert re.search("40 steps: .*attentive.steps, .*1,000", few)
    assert re.search(r"rising \(by 20\.0%\); raise attentive.steps", still)
    assert head_warnings(Trained(None, [0.9] * 1000, 1e-3, []), long) == []


def test_each_epoch_of_cached_features_is_another_permutation():
    features = FeatureBank([str(i) for i in range(10)], torch.arange(10.0)[:, None], torch.arange(10) + 100)
    batches = list(stored_steps({1: features}, range(7), 5, seed=3))
    rows = torch.cat([batch.inputs[1][:, 0] for batch in batches]).long()
    epochs = rows[:30].view(3, 10)
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    for batch in batches:
        assert batch.targets.tolist() == [100 + row for row in batch.inputs[1][:, 0].long().tolist()]
    later = list(stored_steps({1: features}, range(4, 7), 5, seed=3))
    assert all(torch.equal(one.inputs[1], other.inputs[1]) for one, other in zip(batches[4:], later))
    odd = torch.cat([batch.inputs[1][:, 0] for batch in stored_steps({1: features}, range(10), 3, seed=3)]).long()
    assert torch.equal(odd, rows[:30]), "a step may span two epochs"
    other = next(iter(stored_steps({1: features}, range(1), 10, seed=4)))
    assert not torch.equal(other.inputs[1][:, 0].long(), epochs[0])
