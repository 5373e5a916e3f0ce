"""Metrics that are not dominated by a large class."""

import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from m3ae_fast.base.parquet import read_parquet, write_parquet
from m3ae_fast.evaluation import class_metrics as metrics
from m3ae_fast.evaluation.class_metrics import class_metrics, draw_class_metrics
from m3ae_fast.evaluation.compare import ComparedPredictions
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.standard_error import standard_error
from tests.evaluation.conftest import settings
from tests.helpers.labelled import labelled_tar


def _table(folder, labels, predictions, scores=None, keys=None):
    scores = np.full(len(labels), 0.75) if scores is None else scores
    keys = [*map(str, range(len(labels)))] if keys is None else keys
    columns = {"key": keys, "label": [*labels], "prediction": [*predictions], "score": [*scores]}
    write_parquet(folder / "predictions.parquet", columns)


def test_metrics_equal_those_of_scikit_learn(tmp_path):
    random = np.random.default_rng(0)
    for classes in (["bad", "good"], [0, 1], range(7)):
        labels = np.array(classes)[(random.random(200) ** 2 * len(classes)).astype(int)]
        logits = random.normal(size=(200, len(classes)))
        logits[np.arange(200), np.searchsorted(classes, labels)] += 1
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        predictions = np.array(classes)[shares.argmax(1)]
        _table(tmp_path, labels.tolist(), predictions.tolist(), shares.max(1))
        found = class_metrics(tmp_path, classes, [*map(str, classes)], {})
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
        assert sum(row["samples"] for row in found["per_class"]) == 200
        for row in found["per_class"]:
            own = labels == row["class"]
            assert row["accuracy"] == pytest.approx((predictions[own] == row["class"]).mean()) and "name" not in row
        if len(classes) == 2:
            assert found["auroc"] == pytest.approx(roc_auc_score(labels == classes[1], shares[:, 1]), abs=1e-9)
        assert ("auroc" in found) == (len(classes) == 2)


def test_classes_that_do_not_occur_among_the_held_out_samples_do_not_count(tmp_path):
    """Only two of three classes occur. The scores of these two need not add up to 1, so the area under the ROC curve
    cannot be computed from the score of the predicted class."""
    _table(tmp_path, ["a", "a", "b"], ["a", "c", "b"])
    found = class_metrics(tmp_path, ["a", "b", "c"], ["a", "b", "c"], {})
    assert found["balanced_accuracy"] == 0.75 and not {"auroc", "auroc_se"} & found.keys()
    errors = standard_error(0.5, 2), standard_error(1, 1)
    assert found["balanced_accuracy_se"] == pytest.approx(np.hypot(*errors) / 2)
    assert [(row["class"], row["samples"], row["accuracy"]) for row in found["per_class"]] == [
        ("a", 2, 0.5),
        ("b", 1, 1),
    ]
    _table(tmp_path, ["b", "b"], ["a", "b"])
    # an area under the curve requires samples of both classes
    found = class_metrics(tmp_path, ["a", "b"], ["a", "b"], {})
    assert found["balanced_accuracy"] == 0.5 and "auroc" not in found


def test_ties_count_one_half_in_the_area_under_the_curve():
    positive, negative = np.array([1.0, 2, 2, 3]), np.array([0.0, 2, 2, 1])
    truth = np.repeat([1, 0], 4)
    assert metrics.auroc(positive, negative) == roc_auc_score(truth, np.concatenate((positive, negative)))


def test_standard_errors_equal_the_deviation_over_redrawn_samples(tmp_path):
    """The standard errors of the balanced accuracy and of the area under the ROC curve differ by less than a fifth from
    the standard deviations over redrawn samples."""
    random = np.random.default_rng(1)
    negative, positive = random.normal(size=(400, 60)), random.normal(1, size=(400, 40))
    areas = [metrics.auroc(p, n) for p, n in zip(positive, negative)]
    assert metrics.auroc_error(np.mean(areas), 60, 40) == pytest.approx(np.std(areas), rel=0.2)
    sizes, shares = np.array([400, 90, 25]), (0.9, 0.5, 0.7)
    labels, balanced, errors = np.repeat(range(3), sizes), [], []
    for draw in range(300):
        right = random.random(sizes.sum()) < np.repeat(shares, sizes)
        balanced.append(np.mean([right[labels == label].mean() for label in range(3)]))
        if draw % 30 == 0:
            _table(tmp_path, labels.tolist(), np.where(right, labels, (labels + 1) % 3).tolist())
            found = class_metrics(tmp_path, range(3), ["0", "1", "2"], {})
            assert found["balanced_accuracy"] == pytest.approx(balanced[-1])
            errors.append(found["balanced_accuracy_se"])
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(balanced), rel=0.2)


def test_the_standard_error_of_the_auroc_depends_on_the_numbers_of_positives_and_negatives(tmp_path):
    """Positives and negatives contribute differently if the classes overlap little."""
    random = np.random.default_rng(0)
    for few in ("good", "bad"):
        sizes = {"bad": 60, "good": 4} if few == "good" else {"bad": 4, "good": 60}
        areas, errors = [], []
        for draw in range(300):
            own = {name: random.exponential(6.0 if name == "good" else 1.0, size) for name, size in sizes.items()}
            areas.append(metrics.auroc(own["good"], own["bad"]))
            if draw % 10 == 0:
                labels = np.repeat([*own], [*sizes.values()])
                second = np.concatenate([*own.values()]) / 100 + 0.2  # probability of the second class
                predictions = np.where(second > 0.5, "good", "bad")
                _table(tmp_path, labels.tolist(), predictions.tolist(), np.maximum(second, 1 - second))
                found = class_metrics(tmp_path, ["bad", "good"], ["bad", "good"], {})
                assert found["auroc"] == pytest.approx(areas[-1])
                errors.append(found["auroc_se"])
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(areas), rel=0.25)


def test_per_class_results_contain_class_names(tmp_path):
    _table(tmp_path, [0, 0, 1], [0, 1, 1])
    rows = class_metrics(tmp_path, range(2), ["cat", "dog"], {})["per_class"]
    assert rows == [
        {"class": 0, "samples": 2, "accuracy": 0.5, "name": "cat"},
        {"class": 1, "samples": 1, "accuracy": 1.0, "name": "dog"},
    ]


def test_a_result_not_above_the_accuracy_of_the_largest_class_has_a_warning(tmp_path):
    labels = [0] * 70 + [1] * 30

    def warning(predictions, **more):
        _table(tmp_path, labels, predictions, **more)
        return class_metrics(tmp_path, range(2), ["0", "1"], {}).get("warnings", [None])[0]

    says = "the model is not significantly better than the largest class: top-1 accuracy {}, largest class 70.0%"
    assert warning([0] * 100) == says.format("70.0%")  # balanced accuracy 0.5
    assert warning([1] * 100) == says.format("30.0%")
    # one percentage point is not significant
    assert warning([0] * 68 + [1] * 2 + [1] * 3 + [0] * 27) == says.format("71.0%")
    assert warning(labels) is None
    twice = class_metrics(tmp_path, range(2), ["0", "1"], {})
    _table(tmp_path, labels, labels, keys=[*map(str, range(50))] * 2)  # such as predictions of two layers
    assert "balanced_accuracy" in twice and class_metrics(tmp_path, range(2), ["0", "1"], {}).keys() == {"chance"}
    write_parquet(tmp_path / "predictions.parquet", {"key": ["a"], "score": [1.0]})
    assert class_metrics(tmp_path, (), [], {}) == {}


def test_the_confusion_matrix_counts_the_predictions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics, "draw_confusion", lambda path, *what: drawn.append((path, *what)))
    _table(tmp_path, ["b", "a", "c"], ["b", "c", "c"])
    draw_class_metrics(tmp_path, ["a", "b", "c"], ["A", "B", "C"])
    ((path, labels, predictions, names),) = drawn
    assert (path, names) == (tmp_path / "confusion.png", ["A", "B", "C"])
    assert (labels.tolist(), predictions.tolist()) == ([1, 0, 2], [1, 2, 2])


def test_a_task_reports_all_class_metrics(transfer, run, tmp_path, capsys):
    """The metrics are in result.json, in the last printed lines and in the report."""
    skewed = {number: int(number % 9 == 0) for number in range(36)}
    shard = labelled_tar(tmp_path / "a.tar", range(36), skewed)
    result = transfer("knn", *settings("knn.k=30"), train=shard, val=shard)
    table = read_parquet(tmp_path / "out/predictions.parquet")
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(table["label"], table["prediction"]))
    assert 0 <= result["auroc"] <= 1 and [row["samples"] for row in result["per_class"]] == [32, 4]
    output = capsys.readouterr().out
    assert "balanced_accuracy 0." in output and "auroc 0." in output
    assert f"warning: {result['warnings'][0]}\n" in output and (tmp_path / "out/confusion.png").exists()
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    balanced = f"{result['balanced_accuracy']:.1%} ± {result['balanced_accuracy_se']:.1%}"
    assert f'<td>balanced_accuracy</td><td class="number">{balanced}</td><td class="number">50.0%</td>' in page
    assert f"<b>warning</b>: knn of {run}: the model is not significantly better than the largest class" in page
    rows = re.findall(r"<td>(\d)</td><td class=.number.>(\d+)</td><td", page.partition("accuracy of each class")[2])
    assert sorted(rows) == [("0", "32"), ("1", "4")]
    accuracies = [row["accuracy"] for row in result["per_class"]]
    assert (rows[0][0] == "0") == (accuracies[0] < accuracies[1]) and accuracies[0] != accuracies[1], (
        "the class with the lowest accuracy is first"
    )
    for model in (f"random:{run}", "pixels"):
        (tmp_path / "out/result.json").write_text(json.dumps(result | {"model": model}))
        write_report(tmp_path / "out", tmp_path / "report.html")
        assert "<b>warning</b>" not in (tmp_path / "report.html").read_text()


def test_a_comparison_reports_balanced_accuracies_and_warnings():
    labels = torch.tensor([0] * 90 + [1] * 10)
    found = ComparedPredictions([0, 1])
    for model, best in (("blind", torch.zeros(100, dtype=torch.long)), ("good", labels)):
        found.add(model, "knn", 0, Predictions([*map(str, range(100))], labels, best[:, None], torch.ones(100)))
    assert [row["balanced_accuracy"] for row in found.result()["rows"]] == [0.5, 1.0]
    page = found.page()
    assert "- warning: knn: blind is not significantly better than the largest class" in page
    assert page.count("warning") == 1
