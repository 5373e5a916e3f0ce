"""Samples with lists of labels, and the mean average precision of their scores."""

import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.label_lists import list_corpus
from m3ae_fast.evaluation.baselines import MODEL
from m3ae_fast.evaluation.difference import compare_results
from m3ae_fast.evaluation.multilabel import average_precisions, measured, neighbour_scores, resampled
from m3ae_fast.evaluation.significance import Difference
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.logistic_regression import fit
from tests.evaluation.conftest import same_as_baseline, settings
from tests.helpers import task_cases
from tests.helpers.labelled import NAMES, coloured
from tests.helpers.shards import write_tar


def tagged_tar(path, tags):
    """Write a shard of coloured images with these lists of labels, by sample number."""
    members = []
    for number, own in tags.items():
        members.append((f"{number:03}.png", coloured(number, NAMES[number % 3])))
        members.append((f"{number:03}.json", json.dumps({"tags": own}).encode()))
    return write_tar(path, members)


def tags_of(numbers):
    """Return the lists of labels of the samples: "blue" and "cold" for blue images, "green" and "cold" for green ones,
    and an empty list for red ones.
    """
    lists = {0: ["cold", "blue"], 1: ["green", "cold"], 2: []}
    return {number: lists[number % 3] for number in numbers}


def corpus_of(tmp_path, tags):
    return open_corpus([SourceConfig(shards=[tagged_tar(tmp_path / "a.tar", tags)])], ShardStore(tmp_path))


@pytest.mark.parametrize("task", ["logistic", "knn"])
def test_labels_determined_by_the_colour_are_predicted(transfer, tmp_path, task, capsys):
    train = tagged_tar(tmp_path / "train.tar", tags_of(range(45)))
    val = tagged_tar(tmp_path / "val.tar", tags_of(range(90, 108)) | {200: ["rare", "blue", "cold"]})
    options = ["--labels", "json.tags", *(settings("knn.k=5") if task == "knn" else [])]
    result = transfer(task, *options, train=train, val=val)
    assert result["map"] > 0.9 > 0.6 > result["chance_map"] and "warnings" not in result
    assert [row["class"] for row in result["per_class"]] == ["blue", "cold", "green"]
    assert (result["train_samples"], result["val_samples"], result["skipped"]) == (45, 19, 0)
    output = capsys.readouterr().out
    assert "note: 1 labels that occur in --val have no training samples, and are left out" in output
    assert f"{task}: {result['verdict']}\n" in output and f"map {result['map']:.4f} ± {result['map_se']:.4f}" in output
    table = read_parquet(tmp_path / "out/predictions.parquet")
    assert table["labels"][0] == ["blue", "cold"] and table["labels"][2] == []
    truth, scores = np.array([["green" in own for own in table["labels"]]])[0], np.array(table["scores"])[:, 2]
    assert result["per_class"][2]["average_precision"] == pytest.approx(average_precision_score(truth, scores))


@pytest.mark.slow
def test_grids_of_probes_of_lists_of_labels_are_refused(transfer, tmp_path):
    task_cases.write_data(tmp_path)
    given = {"train": str(tmp_path / "train.tar"), "val": str(tmp_path / "val.tar")}
    with pytest.raises(UserError, match=r"labels json\.tags: are lists, for which layers, pools and shots are not"):
        transfer("knn", "--labels", "json.tags", "--layers", "1", **given)


def test_two_results_on_lists_of_labels_are_compared_as_a_model_and_its_baseline(transfer, tmp_path):
    data = {"train": tagged_tar(tmp_path / "train.tar", tags_of(range(45)))}
    wrong = {number: ["green"] for number in range(108, 114)}
    data["val"] = tagged_tar(tmp_path / "val.tar", tags_of(range(90, 108)) | wrong)
    line, expected = same_as_baseline(transfer, tmp_path, "knn", "--labels", "json.tags", **data)
    assert line == f"mAP: {expected}"
    data["train"] = tagged_tar(tmp_path / "train.tar", tags_of(range(45)) | {50: ["new"]})
    transfer("knn", "--labels", "json.tags", out="more", **data)
    with pytest.raises(UserError, match="have different lists of labels; choose results with the same --labels and"):
        compare_results([tmp_path / "one", tmp_path / "more"])


def test_copies_of_an_image_are_drawn_together():
    """A sample that occurs four times has the standard error of one sample, not of four."""
    random = np.random.default_rng(0)
    truth = random.random((50, 2)) < 0.4
    scores = truth + random.normal(size=(50, 2))
    one, copied = ([np.repeat(each, times, 0) for each in (truth, scores)] for times in (1, 4))
    hashes = [str(number) for number in range(50) for _ in range(4)]
    apart, together = (resampled(copied[0], {"a": copied[1]}, 0, own)["a"].values_B[1:].std() for own in ((), hashes))
    alone = resampled(one[0], {"a": one[1]}, 0)["a"].values_B[1:].std()
    assert together == pytest.approx(alone) and apart < 0.7 * alone


def test_average_precisions_equal_those_of_scikit_learn():
    random = np.random.default_rng(0)
    truth, scores = random.random(60) < 0.3, random.normal(size=60).round(1)  # some scores are equal
    weights = random.multinomial(60, np.full(60, 1 / 60), size=5)
    found = average_precisions(truth, scores, np.concatenate((np.ones((1, 60), int), weights)))
    expected = [average_precision_score(truth, scores, sample_weight=each) for each in (np.ones(60), *weights)]
    np.testing.assert_allclose(found, expected)
    none = average_precisions(np.zeros(4, bool), np.arange(4.0), np.ones((1, 4), int))
    assert np.isnan(none).all()


def test_scores_at_chance_level_have_a_warning():
    random = np.random.default_rng(0)
    truth = random.random((300, 4)) < (0.5, 0.2, 0.1, 0.0)
    result = measured(truth, {MODEL: random.normal(size=(300, 4))}, np.ones(4, bool), [*"abcd"], 0)
    assert result["chance_map"] == pytest.approx(truth[:, :3].mean()) and result["classes"] == 3
    assert result["warnings"][0].startswith("the model is not significantly better than chance: mAP")
    assert "warnings" not in measured(truth, {MODEL: truth + 0.0}, np.ones(4, bool), [*"abcd"], 0)
    with pytest.raises(UserError, match="no readable sample has a label that also occurs"):
        measured(truth, {MODEL: truth + 0.0}, np.array([False] * 3 + [True]), [*"abcd"], 0)


def test_the_confidence_interval_contains_the_estimate_for_rare_labels():
    """A positive sample that is drawn twice raises the average precision, but not the chance level."""
    random = np.random.default_rng(0)
    truth = random.random((80, 200)) < 0.015
    scores = {MODEL: truth + random.normal(size=(80, 200))}
    result = measured(truth, scores, np.ones(200, bool), [*map(str, range(200))], 0)
    low, high = (float(end) for end in re.search(r"interval (\S+) to (\S+)", result["verdict"]).groups())
    assert low < 100 * (result["map"] - result["chance_map"]) < high


def test_bootstrap_samples_that_lack_a_class_are_ignored_for_that_class():
    """With few samples, a bootstrap sample may contain no class. It then has neither an average precision nor a chance
    level."""
    truth = np.array([[True, False], [False, True], [False, False]])
    result = measured(truth, {MODEL: np.zeros((3, 2))}, np.ones(2, bool), ["a", "b"], 0)
    assert result["map"] == result["chance_map"] == pytest.approx(1 / 3)
    assert 0 < result["map_se"] < 1 and "interval +0.0 to +0.0" in result["verdict"] and "warnings" in result


def test_a_model_and_its_baseline_are_compared_on_the_same_bootstrap_samples():
    random = np.random.default_rng(0)
    truth = random.random((200, 2)) < 0.4
    good, poor = (truth + scale * random.normal(size=(200, 2)) for scale in (0.5, 1.5))
    known, names = np.ones(2, bool), ["a", "b"]
    result = measured(truth, {MODEL: good, "poor": poor, "same": good}, known, names, 0)
    found, alone = result["baselines"], measured(truth, {MODEL: poor}, known, names, 0)
    assert found["poor"].items() >= {name: alone[name] for name in ("map", "map_se")}.items()
    apart = Difference.read(found["poor"]["difference"])
    assert apart.value == pytest.approx(result["map"] - alone["map"]) and apart.is_better and apart.low < apart.value
    assert found["same"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "significant": False}
    assert result["warnings"][0].startswith("the model is not significantly better than same: mAP ")


def test_the_standard_error_of_a_single_sample_is_undefined():
    truth = np.array([[True, False]])
    result = measured(truth, {MODEL: np.array([[1.0, 0.0]])}, np.ones(2, bool), ["a", "b"], 0)
    assert result["map"] == 1.0 and not {"map_se", "verdict"} & result.keys()
    assert re.search("mAP cannot be estimated .*use more", result["warnings"][0])


def test_k_nn_votes_and_logistic_regression_are_computed_per_class():
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(80, 5, generator=generator), torch.randn(9, 5, generator=generator)
    truth = torch.stack((train[:, 0] > 0, train[:, 1] > 0.5, torch.ones(80) > 0, torch.zeros(80) > 0), 1)
    bank, asked = FeatureBank([*map(str, range(80))], train, None), FeatureBank([*"abcdefghi"], queries, None)
    votes = neighbour_scores(bank, asked, truth, 80, 1e6)  # all votes have equal weight
    torch.testing.assert_close(votes, truth.float().mean(0).expand(9, 4))
    scores = logits(fit(bank, truth, 4), asked)
    assert (scores[:, :2].sign() == (queries[:, :2] - torch.tensor([0, 0.5])).sign()).float().mean() > 0.85
    assert len(scores[:, 2].unique()) == len(scores[:, 3].unique()) == 1


def test_label_lists_become_class_ids(tmp_path):
    found = list_corpus(corpus_of(tmp_path, {0: [3, 1, 1], 1: [], 2: [1, 3], 3: [1]}), "json.tags")
    assert found.classes == [1, 3] and found.corpus.sources[0].labels.tolist() == [0, 1, 0, 2]
    assert found.classes_LC.tolist() == [[True, True], [False, False], [True, False]]
    other = list_corpus(found.corpus, "json.tags", [1, 2])
    assert other.unknown == 1 and other.classes_LC.tolist() == [[True, False], [False, False], [True, False]]
    with pytest.raises(UserError, match=r"no list .* contains a label that occurs in the training samples"):
        list_corpus(found.corpus, "json.tags", [2])


@pytest.mark.parametrize(
    ("tags", "field", "message"),
    [
        ({0: ["a"], 1: None}, "json.tags", "1 of 2 samples have no list of labels"),
        ({0: "a"}, "json.tags", 'a.tar/000: json.tags is "a", not a list as in other samples'),
        ({0: ["a", 1]}, "json.tags", "some labels .* are integers and some are text"),
        ({0: []}, "json.tags", "the lists of all samples .* are empty"),
        ({0: [None]}, "json.tags", "the list json.tags contains null"),
        ({0: [0.5]}, "json.tags", "must be an integer or text, but is 0.5"),
    ],
)
def test_labels_that_are_not_lists_are_refused(tmp_path, tags, field, message):
    with pytest.raises(UserError, match=message):
        list_corpus(corpus_of(tmp_path, tags), field)
