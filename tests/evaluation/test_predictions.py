"""The predictions that a task stores for each sample, and the significance of the difference between two results."""

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy import stats
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from m3ae_fast.evaluation.job import summary
from m3ae_fast.evaluation.ood import SCORES
from m3ae_fast.evaluation.significance import difference, mcnemar, mean_accuracy
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.standard_error import standard_error
from tests.evaluation.conftest import settings

pytestmark = pytest.mark.slow


def _columns(folder):
    return parquet.read_table(folder / "predictions.parquet").to_pydict()


def test_accuracies_equal_those_of_scikit_learn_with_the_standard_error_of_a_mean():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(200, 8, generator=generator), torch.randint(8, (200,), generator=generator)
    found = Predictions.of([str(i) for i in range(200)], labels, scores)
    values = found.accuracies()
    assert values["top1"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert values["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert values["top1_se"] == pytest.approx(stats.sem(found.correct_N.numpy().astype(float), ddof=0))
    np.testing.assert_allclose(found.scores_N, scores.softmax(1).max(1).values)
    halves = [Predictions.of(found.keys[part], labels[part], scores[part]) for part in (slice(90), slice(90, 200))]
    joined = Predictions.joined(halves)
    assert joined.keys == found.keys and torch.equal(joined.best_NK, found.best_NK)


def test_the_score_of_a_prediction_is_its_fraction_of_the_votes():
    found = Predictions.of(["a", "b"], torch.tensor([1, 0]), torch.tensor([[1.0, 3.0], [1.0, 1.0]]), votes=True)
    assert found.scores_N.tolist() == [0.75, 0.5]
    assert found.columns(["cat", "dog"]) == {
        "key": ["a", "b"], "label": ["dog", "cat"], "prediction": ["dog", "cat"], "score": [0.75, 0.5]
    }  # fmt: skip


@pytest.mark.parametrize("task", ["knn", "linear", "finetune"])
def test_a_task_stores_the_predictions_behind_its_accuracy(transfer, tmp_path, task, capsys):
    quick = settings("train.steps=3", "train.global_batch=16", "optim.warmup_epochs=0")
    result = transfer(task, "--labels", "json.name", *(quick if task != "knn" else ()))
    table = _columns(tmp_path / "out")
    assert list(table) == ["key", "label", "prediction", "score", "image_hash"]
    assert len({*table["key"]}) == 18 and {*table["label"]} == {"blue", "green", "red"}
    right = np.mean([label == made for label, made in zip(table["label"], table["prediction"])])
    assert result["top1"] == pytest.approx(right)
    assert result["top1_se"] == pytest.approx(standard_error(right, 18))
    assert all(0 < score <= 1 for score in table["score"])
    assert f"top1 {result['top1']:.4f} ± {result['top1_se']:.4f}" in capsys.readouterr().out


def test_ood_stores_the_scores_of_each_sample(transfer, shards, tmp_path):
    found = transfer("ood", "--ood", f"a={shards[0]}", "--ood", f"same={shards[1]}", out="ood")
    table = _columns(tmp_path / "ood")
    assert table["set"] == ["val"] * 18 + ["a"] * 48 + ["same"] * 18 and len(table["knn"]) == len(table["key"]) == 84
    assert {found[f"same_{score}_auroc"] for score in SCORES} == {0.5}  # this set has the same images as val


def test_mcnemars_test_is_a_binomial_test_on_the_discordant_samples():
    first = np.array([1] * 10 + [1] * 8 + [0] * 2 + [0] * 5, dtype=bool)
    second = np.array([1] * 10 + [0] * 8 + [1] * 2 + [0] * 5, dtype=bool)
    by_hand = 2 * (1 + 10 + 45) / 2**10  # two or fewer heads in ten coin tosses, on either side
    assert mcnemar(first, second) == pytest.approx(by_hand) == mcnemar(second, first)
    assert mcnemar(first, first) == 1.0
    for one, other in ((0, 6), (3, 3), (7, 21), (480, 530), (3000, 2500)):
        first = np.array([True] * one + [False] * other)
        expected = stats.binomtest(one, one + other).pvalue
        assert mcnemar(first, ~first) == pytest.approx(expected, rel=1e-9)


def test_the_confidence_interval_of_a_difference_equals_that_of_scipys_bootstrap():
    generator = np.random.default_rng(0)
    first, second = generator.random(300) < 0.7, generator.random(300) < 0.6
    found = difference(first, second)
    assert found.value == pytest.approx(first.mean() - second.mean())
    theirs = stats.bootstrap(
        (first.astype(float) - second,), np.mean, method="percentile", n_resamples=10_000, rng=generator
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.006)
    assert difference(first, second) == found


def test_significant_and_insignificant_differences_are_described():
    right, half = np.ones(100, dtype=bool), np.arange(100) < 80
    assert "MAE is better than M3AE: +20.0 points, 95 % interval" in difference(right, half).words("MAE", "M3AE")
    assert "MAE is worse than M3AE: -20.0" in difference(half, right).words("MAE", "M3AE")
    little = np.arange(100) < 98
    sentence = difference(right, little).words("MAE", "M3AE")
    assert (
        "MAE does not differ significantly from M3AE on these samples: +2.0 points" in sentence
        and "p = 0.5" in sentence
    )
    # as if 5 or 6 tossed coins all showed heads
    five, six = (difference(right, np.arange(100) >= count) for count in (5, 6))
    assert (five.p, six.p) == pytest.approx((2 / 2**5, 2 / 2**6)) and min(five.low, six.low) > 0
    assert six.is_significant and not five.is_significant
    # one model is right with two of three seeds, the other with one
    of_seeds = difference(np.full(100, 2 / 3), np.full(100, 1 / 3))
    assert of_seeds.value == pytest.approx(1 / 3) and of_seeds.is_significant


def test_a_summary_prints_each_standard_error_after_its_value():
    assert summary({"top1": 0.5, "top1_se": 0.05, "k": 20, "task": "knn"}) == "top1 0.5000 ± 0.0500  k 20"
    assert standard_error(0.5, 100) == 0.05


def test_the_standard_error_of_an_accuracy_of_0_or_1_is_not_0():
    """For 2 samples that are both classified correctly, Laplace's estimate of the accuracy is 3/4."""
    assert standard_error(1.0, 2) == standard_error(0.0, 2) == pytest.approx((0.75 * 0.25 / 2) ** 0.5)
    for right in (np.ones((3, 2), bool), np.zeros((1, 2), bool)):
        assert mean_accuracy(right) == (right.mean(), standard_error(1.0, 2))
