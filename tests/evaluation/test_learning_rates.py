"""The choice of a linear probe's learning rate among the candidates."""

import math
from dataclasses import replace

import pytest
import torch

from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.evaluation import logistic_regression
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import judge, logits, losses
from m3ae_fast.evaluation.heads import LinearHeads
from m3ae_fast.evaluation.learning_rates import FACTORS, RateTrial, best, choose, edge, split, within_error
from m3ae_fast.evaluation.logistic_regression import INVERSE_STRENGTHS, fit_chosen
from m3ae_fast.evaluation.probes import Setting, linear_recipe, train_heads, try_rates
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import join_ranks


def _bank(count, seed=0):
    """Return a FeatureBank with three features, one per class; the feature of a sample's class is large."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    features = torch.randn(count, 8, generator=generator)
    features[torch.arange(count), labels] += 2
    return FeatureBank([f"a.tar/{i:04}" for i in range(count)], features, labels, None, [])


class _Heartbeats:
    def __init__(self):
        self.marks = 0

    def mark(self, doing):
        assert hasattr(Heartbeats, "mark")
        self.marks += 1


def test_a_tenth_of_the_samples_is_held_out_by_key_in_any_order():
    bank = _bank(203)
    train, held_out = split(bank)
    assert (len(train), len(held_out)) == (183, 20)
    assert sorted(train + held_out) == list(range(203))
    assert held_out == sorted(held_out) != list(range(held_out[0], held_out[0] + 20))
    keys = [bank.keys[row] for row in held_out]
    reversed_bank = replace(bank, keys=bank.keys[::-1])
    assert {reversed_bank.keys[row] for row in split(reversed_bank).held_out} == {*keys}
    moved = replace(bank, keys=[f"/data/elsewhere/{key}" for key in bank.keys])  # the same data in another folder
    assert split(moved).held_out == held_out


def _setting(ranks, seed=0, heartbeats=None, **linear):
    given = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, "linear": linear})
    return Setting(given, 3, 1, seed, ranks, heartbeats or _Heartbeats())


def _tried(bank, setting, usual=None):
    """Return the results of the learning rates around `usual`, or around the default for the number of samples."""
    recipe = linear_recipe(len(bank.keys), setting)
    if usual is not None:  # as if the learning rate were not set
        peak = setting.config.linear.peak_lr
        scales = {float(f"{factor * usual:.3g}"): factor * usual / peak for factor in FACTORS}
        recipe = replace(recipe, scales=scales)
    return try_rates({0: bank}, recipe, setting)[0]


def test_each_learning_rate_is_tried_in_an_independent_training():
    """The loss decreases with the best learning rate, and the trials leave the state of torch's random generator
    unchanged."""
    given = {"global_batch": 16, "steps": 40, "warmup_epochs": 0, "peak_lr": 400.0}
    with join_ranks() as ranks:
        state, heartbeats = torch.get_rng_state(), _Heartbeats()
        tried = _tried(_bank(200), _setting(ranks, heartbeats=heartbeats, **given), 400.0)
        again = _tried(_bank(200), _setting(ranks, **given), 400.0)
        assert torch.equal(torch.get_rng_state(), state)
        assert _tried(_bank(9), _setting(ranks, **given), 400.0) == []
    assert tried == again and heartbeats.marks == 40
    assert [each.peak_lr for each in tried] == [float(f"{400 * factor:.3g}") for factor in FACTORS]
    assert best(tried).top1 >= 0.8 and len({each.loss for each in tried}) == len(FACTORS)


def test_linear_heads_are_trained_by_lars_with_warm_up_and_cosine():
    """The expected head is computed with LARS' formulas. Each step has all samples, so their order does not matter."""
    bank, rates = _bank(64), []
    given = {"global_batch": 64, "steps": 8, "warmup_epochs": 2, "weight_decay": 0.1, "momentum": 0.5, "peak_lr": 400.0}
    with join_ranks() as ranks:
        setting = _setting(ranks, 3, **given)
        found = train_heads({0: bank}, linear_recipe(64, setting), setting)[0].heads
    head = LinearHeads(8, 3, [3])
    weights = [p[0].detach().clone().requires_grad_() for p in (head.linear.weight, head.linear.bias)]
    buffers = [torch.zeros_like(p) for p in weights]
    mean, var = bank.features_RD.mean(0), bank.features_RD.var(0, correction=0)
    inputs = (bank.features_RD - mean) / (var + 1e-5).sqrt()
    for step in range(8):
        rates.append(400 * 64 / 256 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2))
        loss = torch.nn.functional.cross_entropy(inputs @ weights[0].T + weights[1], bank.labels)
        for p, gradient, buffer in zip(weights, torch.autograd.grad(loss, weights), buffers):
            update = gradient + 0.1 * p.detach()
            if p.any():  # the bias is 0 at first, and its update is then not scaled
                update = 1e-3 * p.detach().norm() / update.norm() * update
            buffer.mul_(0.5).sub_(rates[-1] * update)
            p.data += buffer
    for p, expected in zip((found.linear.weight, found.linear.bias), weights):
        torch.testing.assert_close(p[0].detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.norm.mean, (1 - 0.9**8) * mean)
    torch.testing.assert_close(found.norm.var, (1 - 0.9**8) * var + 0.9**8)


def test_a_trial_has_the_result_of_training_with_its_learning_rate():
    """The training has momentum, weight decay and warm-up, and the statistics of all steps are compared."""
    bank = _bank(200)
    train, held_out = (bank.rows(rows) for rows in split(bank))
    given = {"global_batch": 16, "steps": 20, "warmup_epochs": 0.5, "weight_decay": 0.3, "momentum": 0.5}
    with join_ranks() as ranks:
        for each in _tried(bank, _setting(ranks, 7, **given, peak_lr=40.0), 40.0)[1::2]:
            at_it = given | {"peak_lr": each.peak_lr, "warmup_epochs": 0.5 * 200 / 180}
            setting = _setting(ranks, 7, **at_it)
            trained = train_heads({0: train}, linear_recipe(180, setting), setting)[0]
            found_MK = logits(trained.heads, held_out)
            found = torch.nn.functional.cross_entropy(found_MK, held_out.labels_N).item()
            assert each.loss == pytest.approx(found, rel=1e-5), each
            assert each.top1 == pytest.approx((found_MK.argmax(1) == held_out.labels_N).double().mean().item())
            with torch.no_grad():
                torch.testing.assert_close(trained.heads.head(0)(held_out.features_RD), found_MK)


def test_heads_are_judged_on_all_samples_of_a_large_bank():
    """Samples are classified in parts."""
    bank, heads = _bank(600), LinearHeads(8, 3, [0, 1, 2]).eval()
    expected = [heads.linear(bank.features_RD / (1 + 1e-5) ** 0.5)[:, number] for number in range(3)]
    for (top1, loss), logits_NK in zip(judge(heads, bank), expected):
        assert top1 == pytest.approx((logits_NK.argmax(1) == bank.labels).double().mean().item())
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits_NK, bank.labels).item(), rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_accuracy_has_the_standard_error_of_the_held_out_tenth(monkeypatch, seed):
    """If the accuracies had been measured on all samples, another value would be chosen for both probes."""
    generator = torch.Generator().manual_seed(seed)
    labels, features = torch.arange(300) % 3, torch.randn(300, 60, generator=generator)
    features[torch.arange(300), labels] += 1.5
    bank, judged = FeatureBank([f"a.tar/{i:04}" for i in range(300)], features, labels), []
    monkeypatch.setattr(logistic_regression, "_ENOUGH", 30)
    monkeypatch.setattr(logistic_regression, "judge", lambda *of: judged.append(judge(*of)) or judged[-1])
    strength = fit_chosen(bank, 3)[1]
    tried = [RateTrial(each, *found) for each, found in zip(INVERSE_STRENGTHS, judged[0])]
    strongest, too_weak = (min(each.peak_lr for each in within_error(tried, count)) for count in (30, 300))
    assert strength == strongest != too_weak
    with join_ranks() as ranks:
        setting = _setting(ranks, seed, global_batch=64, steps=16, warmup_epochs=0)
        recipe = linear_recipe(300, setting)
        trained = train_heads({0: bank}, recipe, setting)[0]
    assert trained.peak_lr == choose(trained.tried, recipe.usual, 30).peak_lr
    assert trained.peak_lr != choose(trained.tried, recipe.usual, 300).peak_lr


def test_a_learning_rate_that_diverges_is_never_the_best():
    given = {"global_batch": 16, "steps": 20, "warmup_epochs": 0, "peak_lr": 1e38}
    with join_ranks() as ranks:
        tried = _tried(_bank(100), _setting(ranks, **given), 1e38)
    assert tried[-1][1:] == (0.0, None)
    assert best([RateTrial(1, 0.0, None), RateTrial(2, 0.0, 3.0)]).peak_lr == 2


def test_copies_of_an_image_are_on_one_side_of_the_split():
    images = [str(number // 7) for number in range(700)]
    bank = FeatureBank([f"a.tar/{number}" for number in range(700)], torch.zeros(700, 1), None, image_hashes=images)
    train, held_out = ({images[row] for row in rows} for rows in split(bank))
    assert train.isdisjoint(held_out) and len(held_out) == 10
    assert not split(replace(bank, image_hashes=["same"] * 700)).held_out


def test_one_non_finite_logit_shows_that_a_head_has_diverged():
    logits_SHK = torch.zeros(2, 3, 4)
    logits_SHK[1, 2, 0] = math.inf
    assert losses(logits_SHK, torch.tensor([1, 1]))[2].tolist() == [[0, 0, 0], [0, 0, 1]]


def test_a_learning_rate_is_chosen_only_for_a_significant_gain():
    """An accuracy of 70 % on 100 samples has a standard error of 4.6 points."""
    tried = [RateTrial(0.1, 0.7, 0.9), RateTrial(0.3, 0.66, 0.8), RateTrial(1, 0.64, 0.6), RateTrial(3, 0.0, None)]
    assert [choose(tried, usual, 100).peak_lr for usual in (0.1, 0.25, 0.8, 5)] == [0.1, 0.3, 0.3, 0.3]
    assert choose(tried, 1, 50).peak_lr == 1 and choose(tried, 1, 10_000).peak_lr == 0.1
    assert choose([tried[0], RateTrial(1, 0.7, 0.9)], 0.4, 100).peak_lr == 1  # 0.1 is a quarter of the usual rate
    assert choose([RateTrial(1, 0.0, None), RateTrial(2, 0.0, 3.0)], 1.4, 9).peak_lr == 2
    # an accuracy of 100 % on 9 samples has a standard error of about 10 points
    assert choose([RateTrial(1, 8 / 9 + 0.02, 0.1), RateTrial(2, 1.0, 0.1)], 1, 9).peak_lr == 1


def test_among_learning_rates_of_equal_accuracy_the_one_with_the_lowest_loss_is_chosen():
    tried = [RateTrial(0.1, 0.5, 0.9), RateTrial(0.3, 0.7, 0.8), RateTrial(1, 0.7, 0.6)]
    assert best(tried).peak_lr == 1
    assert "1, is the highest candidate" in edge(tried, 1)[0]
    assert "0.1, is the lowest candidate" in edge(tried, 0.1)[0]
    assert edge(tried, 0.3) == edge(tried, 5.0) == edge([], 1.0) == []


def test_the_warning_of_a_learning_rate_at_the_edge_names_the_setting_of_its_probe():
    tried = [RateTrial(rate, 0.5, 1.0) for rate in (0.1, 0.2, 0.4)]
    assert edge(tried, 0.2, "attentive") == []
    assert edge(tried, 0.4, "attentive")[0].endswith("highest candidate; also try a higher attentive.peak_lr")
