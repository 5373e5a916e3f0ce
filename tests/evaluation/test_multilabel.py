"""Samples with lists of labels, and the mean average precision of their scores."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.config import KnnConfig, SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.label_lists import list_corpus
from m3ae_fast.evaluation.baseline_results import MODEL, accuracy_entries
from m3ae_fast.evaluation.compare_results import compare_results
from m3ae_fast.evaluation.multilabel import list_metrics
from m3ae_fast.evaluation.significance import Difference
from m3ae_fast.heads.average_precision import average_precisions, mean_average_precisions, resampled
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.fit_heads import judge, logits, losses
from m3ae_fast.heads.knn import knn_predictions, knn_scores
from m3ae_fast.heads.logistic_regression import fit, fit_chosen
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.pool_choice import best_type
from m3ae_fast.heads.predictions import Predictions
from tests.evaluation.conftest import figure_names, same_as_baseline, settings
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


def measured(truth, scores):
    """Return the entries of result.json for these scores of samples, by name of the model."""
    keys = [*map(str, range(len(truth)))]
    found = {
        name: [Predictions.of(keys, torch.from_numpy(truth), torch.from_numpy(each).float())]
        for name, each in scores.items()
    }
    entries = accuracy_entries(found)
    return entries | list_metrics(found[MODEL][0], [f"class {c}" for c in range(truth.shape[1])], entries)


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
    assert "note: left out 1 label of --val that no training sample has" in output
    assert f"{task}: {result['verdict']}\n" in output and f"map {result['map']:.4f} ± {result['map_se']:.4f}" in output
    assert figure_names(tmp_path / "out") == (["neighbours"] if task == "knn" else [])
    table = read_parquet(tmp_path / "out/predictions.parquet")
    assert table["labels"][0] == ["blue", "cold"] and table["labels"][2] == []
    truth, scores = np.array([["green" in own for own in table["labels"]]])[0], np.array(table["scores"])[:, 2]
    assert result["per_class"][2]["average_precision"] == pytest.approx(average_precision_score(truth, scores))


@pytest.fixture
def tagged(tmp_path):
    """Return options of tasks whose samples have lists of labels."""
    train, val = tags_of(range(45)), tags_of(range(90, 108))
    return {"train": tagged_tar(tmp_path / "train.tar", train), "val": tagged_tar(tmp_path / "val.tar", val)}


def test_the_classifier_of_lists_of_labels_is_saved(transfer, tmp_path, tagged):
    result = transfer("logistic", "--labels", "json.tags", *settings("encode.precision=fp32"), **tagged)
    classifier = Classifier.from_pretrained(tmp_path / "out").eval()
    own = classifier.config
    assert (own.head, own.pool, own.classes) == ("logistic_of_lists", result["pool"], ["blue", "cold", "green"])
    paths = [tmp_path / f"{number:03}.png" for number in range(90, 108)]
    for number, path in enumerate(paths, 90):
        path.write_bytes(coloured(number, NAMES[number % 3]))
    with torch.no_grad():
        features = classifier.backbone.encode([*map(str, paths)], pool=own.pool, precision="fp32")
        logits = classifier.head(features)
    scores = read_parquet(tmp_path / "out/predictions.parquet")["scores"]
    torch.testing.assert_close(logits, torch.tensor(scores), rtol=1e-3, atol=1e-3)
    for task, options in (("robustness", []), ("ood", ["--ood", tagged["val"]])):
        train = {"train": None} if task == "robustness" else {}
        with pytest.raises(UserError, match=f"trained on lists of labels, but {task} needs"):
            transfer(task, *options, model=tmp_path / "out", out=task, **tagged | train)


@pytest.mark.slow
def test_lists_of_labels_have_grids_of_probes(transfer, tmp_path, tagged):
    tagged["val"] = tagged_tar(tmp_path / "wrong.tar", tags_of(range(90, 108)) | {200: ["green"], 201: ["blue"]})
    result = transfer("knn", "--labels", "json.tags", "--layers", "all", "--pools", "mean,cls", **tagged)
    rows = [(row["layer"], row["pool"]) for row in result["results"]]
    assert rows == [(1, "mean"), (1, "cls"), (2, "mean"), (2, "cls")] and (tmp_path / "out/depth.png").exists()
    assert result["results"][2].items() >= {name: result[name] for name in ("map", "map_se", "k")}.items()
    alone = transfer("knn", "--labels", "json.tags", *settings("encode.pool=mean"), out="alone", **tagged)
    assert alone.items() >= {name: result[name] for name in ("map", "map_se", "k", "verdict", "per_class")}.items()
    assert "mAP: " in compare_results([tmp_path / "out", tmp_path / "alone"])


@pytest.mark.slow
def test_attentive_probes_learn_lists_of_labels(transfer, tagged):
    short = settings("attentive.steps=60", "attentive.batch=16")
    result = transfer("attentive", "--labels", "json.tags", *short, **tagged)
    assert result["map"] > 0.9 > 0.6 > result["chance_map"] and result["peak_lr"]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("knn", ["--shots", "2"], "leave out shots"),
        ("attentive", settings("attentive.online=true"), "add --set attentive.online=false"),
    ],
)
def test_options_that_lists_of_labels_do_not_support_are_refused(transfer, tagged, task, options, message):
    with pytest.raises(UserError, match=rf"json\.tags: lists support neither shots nor online training; {message}"):
        transfer(task, "--labels", "json.tags", *options, **tagged)


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
    apart, together = (resampled(*copied, own).values_B[1:].std() for own in ((), hashes))
    alone = resampled(*one).values_B[1:].std()
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
    result = measured(truth, {MODEL: random.normal(size=(300, 4))})
    assert result["chance_map"] == pytest.approx(truth[:, :3].mean()) and result["classes"] == 3
    assert result["warnings"][0].startswith("the model is not significantly better than chance: mAP")
    assert "warnings" not in measured(truth, {MODEL: truth + 0.0})
    with pytest.raises(UserError, match="no readable sample has a label that also occurs"):
        measured(truth[:, 3:], {MODEL: truth[:, 3:] + 0.0})


def test_the_confidence_interval_contains_the_estimate_for_rare_labels():
    """A positive sample that is drawn twice raises the average precision and also the chance level, so both are
    computed from the same bootstrap samples."""
    random = np.random.default_rng(0)
    truth = random.random((80, 200)) < 0.015
    scores = {MODEL: truth + random.normal(size=(80, 200))}
    result = measured(truth, scores)
    low, high = (float(end) for end in re.search(r"interval (\S+) to (\S+)", result["verdict"]).groups())
    assert low < 100 * (result["map"] - result["chance_map"]) < high


def test_bootstrap_samples_that_lack_a_class_are_ignored_for_that_class():
    """With few samples, a bootstrap sample may contain no class. It then has neither an average precision nor a chance
    level."""
    truth = np.array([[True, False], [False, True], [False, False]])
    result = measured(truth, {MODEL: np.zeros((3, 2))})
    assert result["map"] == result["chance_map"] == pytest.approx(1 / 3)
    assert 0 < result["map_se"] < 1 and "interval +0.0 to +0.0" in result["verdict"] and "warnings" in result


def test_a_model_and_its_baseline_are_compared_on_the_same_bootstrap_samples():
    random = np.random.default_rng(0)
    truth = random.random((200, 2)) < 0.4
    good, poor = (truth + scale * random.normal(size=(200, 2)) for scale in (0.5, 1.5))
    result = measured(truth, {MODEL: good, "poor": poor, "same": good})
    found, alone = result["baselines"], measured(truth, {MODEL: poor})
    assert found["poor"].items() >= {name: alone[name] for name in ("map", "map_se")}.items()
    apart = Difference.read(found["poor"]["difference"])
    assert apart.value == pytest.approx(result["map"] - alone["map"]) and apart.is_better and apart.low < apart.value
    assert found["same"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "significant": False}
    assert result["warnings"][0].startswith("the model is not significantly better than same: mAP ")


def test_the_standard_error_of_a_single_sample_is_undefined():
    truth = np.array([[True, False]])
    result = measured(truth, {MODEL: np.array([[1.0, 0.0]])})
    assert result["map"] == 1.0 and not {"map_se", "verdict"} & result.keys()
    assert re.search("mAP cannot be estimated .*use more", result["warnings"][0])


def test_k_nn_votes_and_logistic_regression_are_computed_per_class():
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(80, 5, generator=generator), torch.randn(9, 5, generator=generator)
    truth = torch.stack((train[:, 0] > 0, train[:, 1] > 0.5, torch.ones(80) > 0, torch.zeros(80) > 0), 1)
    bank, asked = FeatureBank([*map(str, range(80))], train, truth), FeatureBank([*"abcdefghi"], queries, None)
    votes = knn_scores(bank, asked, 4, 80, 1e6)  # all votes have equal weight
    torch.testing.assert_close(votes, truth.float().mean(0).expand(9, 4))
    scores = logits(fit(bank, truth, 4), asked)
    assert (scores[:, :2].sign() == (queries[:, :2] - torch.tensor([0, 0.5])).sign()).float().mean() > 0.85
    assert len(scores[:, 2].unique()) == len(scores[:, 3].unique()) == 1


def _tagged_bank(signal, samples=300, width=20):
    """Return a bank of samples with lists of two labels. `signal`: how strongly the features depend on the labels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, width, generator=generator)
    truth = torch.rand(samples, 2, generator=generator) < torch.tensor([0.5, 0.2])
    features[:, :2] += signal * truth
    return FeatureBank([f"a.tar/{i:04}" for i in range(samples)], features, truth)


def test_heads_are_judged_by_the_map_of_their_scores_and_the_binary_cross_entropy():
    bank, heads = _tagged_bank(1.0), LinearHeads(20, 2, [0, 1, 2]).eval()
    heads.linear.weight.data[:, :, 2] = torch.tensor([0.0, 0.0, torch.inf])[:, None]
    (first, loss), _, diverged = judge(heads, bank)
    scores = logits(heads, bank)
    assert first == pytest.approx(average_precision_score(bank.labels.numpy(), scores.numpy()))
    each = torch.nn.functional.binary_cross_entropy_with_logits(scores, bank.labels.float(), reduction="sum") / 300
    assert loss == pytest.approx(each.item()) and diverged == (0.0, None)
    right = losses(scores[:, None], bank.labels)[1][:, 0]
    assert torch.equal(right, bank.labels[torch.arange(300), scores.argmax(1)].float())


def test_pooling_penalty_and_number_of_neighbours_are_chosen_by_the_map():
    """The features of the second pooling have the stronger signal. Features are noisy, so that a strong penalty and
    many neighbours have the highest mAP."""
    weak, strong = _tagged_bank(0.5, width=100), _tagged_bank(1.5, width=100)
    types = [FeatureType(1, "mean"), FeatureType(1, "cls")]
    both = replace(strong, stored_SD=torch.stack((weak.stored_SD, strong.stored_SD), 1), types=types)
    assert best_type(both, 2, SimpleNamespace(mark=lambda what: None))[0] == types[1]
    train, queries = strong.rows(range(200)), strong.rows(range(200, 300))
    assert fit_chosen(train, 2)[1] <= 1e-2
    found = knn_predictions(train, queries, 2, KnnConfig())
    assert found.chosen["k"] == 20
    expected = average_precision_score(queries.labels.numpy(), found.scores_N.numpy())
    assert found.quality == pytest.approx(expected) == pytest.approx(found.accuracies()["map"])


def test_the_map_of_samples_without_labels_is_zero():
    assert mean_average_precisions(np.zeros((3, 2), bool), np.ones((3, 2))).tolist() == [0.0]


def test_label_lists_become_class_ids(tmp_path):
    corpus, classes, _ = list_corpus(corpus_of(tmp_path, {0: [3, 1, 1], 1: [], 2: [1, 3], 3: [1]}), "json.tags")
    assert classes == [1, 3] and corpus.sources[0].labels.tolist() == [0, 1, 0, 2]
    assert corpus.lists.tolist() == [[True, True], [False, False], [True, False]]
    other, _, unknown = list_corpus(corpus, "json.tags", [1, 2])
    assert unknown == 1 and other.lists.tolist() == [[True, False], [False, False], [True, False]]
    with pytest.raises(UserError, match=r"no list .* contains a label that occurs in the training samples"):
        list_corpus(corpus, "json.tags", [2])


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
