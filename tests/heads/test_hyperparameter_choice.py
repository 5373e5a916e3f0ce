"""The choice of a hyper-parameter on a held-out tenth of the training samples."""

import math
from dataclasses import replace

import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.heads import logistic_regression
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import judge, logits, losses
from m3ae_fast.heads.hyperparameter_choice import Trial, best, edge, split, within_error
from m3ae_fast.heads.logistic_regression import INVERSE_STRENGTHS, fit_chosen
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.probes import train_heads, try_rates
from m3ae_fast.heads.recipe import ATTENTIVE_RATES, Recipe
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import join_ranks


def _bank(count, seed=0):
    """Return a FeatureBank of samples of three classes, with eight features. Of the first three features, the one with
    the number of a sample's class is larger for this sample."""
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
    assert {reversed_bank.keys[row] for row in split(reversed_bank)[1]} == {*keys}
    moved = replace(bank, keys=[f"/data/elsewhere/{key}" for key in bank.keys])  # the same data in another folder
    assert split(moved)[1] == held_out


def _recipe(samples, seed=0, **attentive):
    given = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, "attentive": attentive})
    return Recipe.of("attentive", given, classes=3, samples=samples, encoder_heads=1, seed=seed)


def _tried(bank, recipe, ranks, heartbeats=None):
    """Return the results of the learning rates."""
    return try_rates({0: bank}, recipe, ranks, heartbeats or _Heartbeats())[0]


def test_each_learning_rate_is_tried_in_an_independent_training():
    """With the chosen learning rate, at least 80 % of the held-out samples are classified correctly. The trials do not
    change the state of torch's random generator."""
    given = {"batch": 16, "steps": 300}
    with join_ranks() as ranks:
        state, heartbeats = torch.get_rng_state(), _Heartbeats()
        tried = _tried(_bank(200), _recipe(200, **given), ranks, heartbeats)
        again = _tried(_bank(200), _recipe(200, **given), ranks)
        assert torch.equal(torch.get_rng_state(), state)
        assert _tried(_bank(9), _recipe(9, **given), ranks) == []
    assert tried == again and heartbeats.marks == 300
    assert [each.value for each in tried] == [*ATTENTIVE_RATES]
    assert best(tried).quality >= 0.8 and len({each.loss for each in tried}) == len(ATTENTIVE_RATES)


def test_a_trial_has_the_result_of_training_with_its_learning_rate():
    """The training has weight decay. The running statistics of BatchNorm are compared through the logits."""
    bank = _bank(200)
    train, held_out = (bank.rows(rows) for rows in split(bank))
    given = {"batch": 16, "steps": 20, "weight_decay": 0.3}
    with join_ranks() as ranks:
        for each in _tried(bank, _recipe(200, 7, **given), ranks)[1::2]:
            recipe = _recipe(180, 7, **given, peak_lr=each.value)
            trained = train_heads({0: train}, recipe, ranks, _Heartbeats())[0]
            found_MK = logits(trained.heads, held_out)
            found = torch.nn.functional.cross_entropy(found_MK, held_out.labels_N).item()
            assert each.loss == pytest.approx(found, rel=1e-5), each
            assert each.quality == pytest.approx((found_MK.argmax(1) == held_out.labels_N).double().mean().item())
            with torch.no_grad():
                torch.testing.assert_close(trained.heads.head(0)(held_out.features_RD), found_MK)


def test_heads_are_judged_on_all_samples_of_a_large_bank():
    """The bank has so many samples that they are classified in several parts."""
    bank, heads = _bank(600), LinearHeads(8, 3, [0, 1, 2]).eval()
    expected = [heads.linear(bank.features_RD / (1 + 1e-5) ** 0.5)[:, number] for number in range(3)]
    for (quality, loss), logits_NK in zip(judge(heads, bank), expected):
        assert quality == pytest.approx((logits_NK.argmax(1) == bank.labels).double().mean().item())
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits_NK, bank.labels).item(), rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_accuracy_has_the_standard_error_of_the_held_out_tenth(monkeypatch, seed):
    """With the standard error of an accuracy on all samples, which is smaller, another value would be chosen."""
    generator = torch.Generator().manual_seed(seed)
    labels, features = torch.arange(300) % 3, torch.randn(300, 60, generator=generator)
    features[torch.arange(300), labels] += 1.5
    bank, judged = FeatureBank([f"a.tar/{i:04}" for i in range(300)], features, labels), []
    monkeypatch.setattr(logistic_regression, "_ENOUGH", 30)
    monkeypatch.setattr(logistic_regression, "judge", lambda *of: judged.append(judge(*of)) or judged[-1])
    strength = fit_chosen(bank, 3)[1]
    tried = [Trial(each, *found) for each, found in zip(INVERSE_STRENGTHS, judged[0])]
    strongest, too_weak = (min(each.value for each in within_error(tried, count)) for count in (30, 300))
    assert strength == strongest != too_weak


def test_a_learning_rate_that_diverges_is_never_the_best():
    with join_ranks() as ranks:
        tried = _tried(_bank(100), replace(_recipe(100, batch=16, steps=20), rates=(1e-3, 1e38)), ranks)
        assert tried[1][1:] == (0.0, None) and best(tried) == tried[0]
        diverging = _recipe(100, batch=16, steps=20, peak_lr=1e38)
        with pytest.raises(UserError, match=r"not finite; set a lower attentive\.peak_lr"):
            train_heads({0: _bank(100)}, diverging, ranks, _Heartbeats())
    assert best([Trial(1, 0.0, None), Trial(2, 0.0, 3.0)]).value == 2


def test_copies_of_an_image_are_on_one_side_of_the_split():
    images = [str(number // 7) for number in range(700)]
    bank = FeatureBank([f"a.tar/{number}" for number in range(700)], torch.zeros(700, 1), None, image_hashes=images)
    train, held_out = ({images[row] for row in rows} for rows in split(bank))
    assert train.isdisjoint(held_out) and len(held_out) == 10
    assert not split(replace(bank, image_hashes=["same"] * 700))[1]


def test_one_non_finite_logit_shows_that_a_head_has_diverged():
    logits_SHK = torch.zeros(2, 3, 4)
    logits_SHK[1, 2, 0] = math.inf
    assert losses(logits_SHK, torch.tensor([1, 1]))[2].tolist() == [[0, 0, 0], [0, 0, 1]]


def test_values_within_one_standard_error_of_the_best_accuracy_are_selected():
    """An accuracy of 70 % on 100 samples has a standard error of 4.6 points."""
    tried = [Trial(0.1, 0.7, 0.9), Trial(0.3, 0.66, 0.8), Trial(1, 0.64, 0.6)]
    for held_out, expected in ((50, [0.1, 0.3, 1]), (100, [0.1, 0.3]), (10_000, [0.1])):
        assert [each.value for each in within_error(tried, held_out)] == expected
    # an accuracy of 100 % on 9 samples has a standard error of about 10 points
    assert len(within_error([Trial(1, 8 / 9 + 0.02, 0.1), Trial(2, 1.0, 0.1)], 9)) == 2


def test_among_learning_rates_of_equal_accuracy_the_one_with_the_lowest_loss_is_chosen():
    assert best([Trial(0.1, 0.5, 0.9), Trial(0.3, 0.7, 0.8), Trial(1, 0.7, 0.6)]).value == 1


def test_a_warning_names_a_learning_rate_at_the_edge_and_its_setting():
    tried = [Trial(rate, 0.5, 1.0) for rate in (0.1, 0.3, 1)]
    assert edge(tried, 1)[0].endswith("1, is the highest candidate; also try a higher attentive.peak_lr")
    assert edge(tried, 0.1)[0].endswith("0.1, is the lowest candidate; also try a lower attentive.peak_lr")
    assert edge(tried, 0.3) == edge(tried, 5.0) == edge([], 1.0) == []
