"""Copies of an image among the held-out samples count as one cluster in standard errors and significance tests."""

from itertools import product

import numpy as np
import pytest
import torch

from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.evaluation.ood import auroc_interval
from m3ae_fast.evaluation.significance import difference, mcnemar, mean_accuracy
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.standard_error import bootstrap_weights, effective_samples, error_of_accuracy, image_clusters
from tests.helpers.labelled import labelled_members
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import write_tar


def _two_models(samples, seed=0):
    random = np.random.default_rng(seed)
    return random.random(samples) < 0.7, random.random(samples) < 0.55


def test_samples_with_the_same_image_form_a_cluster():
    assert image_clusters(["b", "", "a", "b", "", "a"]).tolist() == [0, 1, 2, 0, 3, 2]
    assert effective_samples(np.array([0, 1, 2])) == 3 and effective_samples(np.array([0, 0, 1, 1])) == 2


@pytest.mark.parametrize("copies", [2, 7])
def test_copying_every_image_changes_neither_errors_nor_tests(copies):
    first, second = _two_models(120)
    clusters = np.repeat(np.arange(120), copies)
    many, others = np.repeat(first, copies), np.repeat(second, copies)
    assert error_of_accuracy(many, clusters) == pytest.approx(error_of_accuracy(first))
    assert error_of_accuracy(many) == pytest.approx(error_of_accuracy(first) / copies**0.5)
    assert error_of_accuracy(many | True, clusters) == error_of_accuracy(first | True) > 0
    assert mean_accuracy(np.stack((many, others)), clusters) == pytest.approx(mean_accuracy(np.stack((first, second))))
    assert difference(many, others, clusters) == pytest.approx(difference(first, second))
    assert mcnemar(many, others, clusters) == mcnemar(first, second)


def test_without_copies_the_result_is_that_of_independent_samples():
    first, second = _two_models(200)
    alone = np.arange(200)
    assert error_of_accuracy(first, alone) == pytest.approx((first.mean() * (1 - first.mean()) / 200) ** 0.5, rel=1e-12)
    found = difference(first, second, alone)
    assert found == difference(first, second)
    assert found.error == pytest.approx((first.astype(float) - second).std() / 200**0.5, rel=0.05)
    generator = np.random.default_rng(5)
    expected = generator.multinomial(200, np.full(200, 1 / 200), size=3)
    assert (bootstrap_weights(alone, 3, 5)[1:] == expected).all()


@pytest.mark.parametrize("seed", range(6))
def test_mcnemars_test_with_clusters_equals_the_enumeration_of_all_coins(seed):
    first, second = _two_models(30, seed)
    clusters = np.random.default_rng(seed).integers(0, 10, 30)
    totals = np.bincount(clusters, first.astype(float) - second, minlength=10)
    coins = np.array([*product((-1, 1), repeat=10)]) @ totals
    assert mcnemar(first, second, clusters) == pytest.approx((abs(coins) >= abs(totals.sum())).mean())


def test_the_clustered_error_is_the_spread_of_accuracies_over_draws_of_clusters():
    """Clusters have 1 to 20 samples, which are all correct or all wrong. Two models that are equally good are found to
    be different in less than 8 % of the draws; the level of the test is 5 %."""
    random, sizes = np.random.default_rng(0), np.tile([1, 1, 2, 5, 20], 30)
    clusters = np.repeat(np.arange(150), sizes)
    accuracies, errors, rejected = [], [], 0
    for _ in range(400):
        first, second = random.random((2, 150)) < 0.6
        accuracies.append(first[clusters].mean())
        errors.append(error_of_accuracy(first[clusters], clusters))
        rejected += mcnemar(first[clusters], second[clusters], clusters) < 0.05
    assert np.mean(errors) == pytest.approx(np.std(accuracies), rel=0.1)
    assert rejected / 400 < 0.08


def test_bootstrap_samples_contain_all_copies_of_an_image_or_none():
    weights = bootstrap_weights(np.array([0, 1, 0, 2, 1, 0]), 50, 0)
    assert (weights[0] == 1).all() and weights[1:].std() > 0
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    inside, outside = np.random.default_rng(0).normal([[0.5], [0.0]], 1.0, (2, 40))
    clusters = [np.repeat(np.arange(40), 3)] * 2
    copied = auroc_interval(np.repeat(inside, 3), np.repeat(outside, 3), 1, clusters)
    assert copied == pytest.approx(auroc_interval(inside, outside, 1))


@pytest.mark.slow
def test_a_result_names_its_copies_and_treats_them_as_one_sample_on_any_number_of_ranks(
    transfer, shards, run, tmp_path
):
    members = [*labelled_members(range(100, 118))]
    copies = [(f"{copy:05d}{name[5:]}", data) for copy in range(200, 210) for name, data in members if "00101" in name]
    val = write_tar(tmp_path / "val.tar", members + copies)
    result = transfer("knn", "--labels", "cls", val=val)
    table = read_parquet(tmp_path / "out/predictions.parquet")
    assert (
        result["val_copies"] == 10
        and "10 of 28 held-out samples have the same image as an earlier one" in result["verdict"]
    )
    right = np.equal(table["label"], table["prediction"])
    assert result["top1_se"] == error_of_accuracy(right, image_clusters(table["image_hash"])) > error_of_accuracy(right)
    assert len({*table["image_hash"]}) == 18
    options = ["knn", str(run), "--train", shards[0], "--val", val, "--no-baselines", "--set", "data.workers=0"]
    for ranks in (2, 3):
        out = tmp_path / f"{ranks}"
        code, log = run_ranks("m3ae_fast.cli.evaluate", [*options, "--out", str(out)], ranks, tmp_path / f"{ranks}.log")
        assert code == 0, log
        assert read_parquet(out / "predictions.parquet") == table
    assert "val_copies" not in transfer("knn", out="without")


def test_predictions_keep_the_images_of_their_samples():
    parts = [
        Predictions.of([key], torch.zeros(1).long(), torch.tensor([[1.0, 0.0]]), image_hashes=[image])
        for key, image in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    assert Predictions.joined(parts).clusters_N.tolist() == [0, 1, 0]
    assert Predictions.joined(parts).columns([0, 1])["image_hash"] == ["x", "y", "x"]
