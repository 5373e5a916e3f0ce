"""Every task has the same result on 1 and 3 ranks."""

import json
import math
import re

import numpy as np
import pytest

from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.evaluation.tasks import TASKS
from m3ae_fast.heads.classifier import Classifier
from tests.helpers import task_cases
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import ROOT

pytestmark = pytest.mark.slow

OF_THE_CALL = ("seconds", "config", "model")


def _assert_close(found, expected, where):
    """Assert that two JSON values are equal, apart from rounding errors of numbers. Texts are not compared, because
    they contain such numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            if name not in OF_THE_CALL:
                _assert_close(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected)):
            _assert_close(one, other, f"{where}[{number}]")
    elif isinstance(expected, float) and not math.isnan(expected):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), where
    elif not isinstance(expected, str):
        assert found == expected or expected != expected, where


@pytest.fixture(scope="module")
def single_rank(run, tmp_path_factory):
    """Return the folder of the data, and the folder with the results of one rank."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("alone")
    task_cases.write_data(data)
    code, output = run_ranks("tests.helpers.task_cases", [str(run), str(data), str(out)], 1, data / "log")
    assert code == 0, output
    return data, out


def test_unreadable_samples_of_all_ranks_are_counted(single_rank):
    results = {name: json.loads((single_rank[1] / name / "result.json").read_text()) for name in task_cases.CASES}
    skipped = {name: result["skipped"] for name, result in results.items() if "skipped" in result}
    assert skipped.pop("finetune") == 1 and {*skipped.values()} == {4}
    assert {"knn", "logistic", "linear", "attentive", "poolings", "shots", "logistic-lists", "segment"} <= {*skipped}
    assert (results["ood"]["train_samples"], results["ood"]["val_samples"]) == (45, 15)


def test_every_task_has_a_test_case():
    assert {task for task, _ in task_cases.CASES.values()} == {*TASKS}


def test_every_task_has_the_same_result_on_one_and_several_ranks(run, single_rank, tmp_path):
    (data, one), ranks = single_rank, 3
    code, output = run_ranks("tests.helpers.task_cases", [str(run), str(data), str(tmp_path)], ranks, tmp_path / "log")
    assert code == 0, output
    for name in task_cases.CASES:
        results = [json.loads((folder / name / "result.json").read_text()) for folder in (tmp_path, one)]
        _assert_close(*results, name)
        found, expected = (read_parquet(folder / name / "predictions.parquet") for folder in (tmp_path, one))
        assert found.keys() == expected.keys()
        for column, values in expected.items():
            if isinstance(values[0], float | list) and column != "labels":
                np.testing.assert_allclose(found[column], values, rtol=2e-3, atol=2e-3, err_msg=f"{name}, {column}")
            else:
                assert found[column] == values, (name, column)
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused.keys() == task_cases.REFUSED.keys()
    for messages in refused.values():
        assert len(messages) == ranks and all(
            re.match("2 of (47|17) samples cannot be used", each) for each in messages
        )
    for name in ("logistic", "linear", "finetune"):
        states = [Classifier.from_pretrained(folder / name).head.state_dict() for folder in (tmp_path, one)]
        for key, value in states[1].items():
            np.testing.assert_allclose(states[0][key], value, rtol=2e-3, atol=2e-3, err_msg=f"{name}, {key}")


def test_tasks_have_the_same_result_on_ranks_without_images_and_with_repeated_images(run, tmp_path):
    """There are two held-out images, and six training images that are repeated with different masks and labels."""
    names = ["knn", "logistic", "linear", "attentive", "knn-lists", "segment", "segment-knn", "ood"]
    task_cases.write_data(tmp_path, train=range(200, 260), val=range(300, 302), distinct=6)
    for ranks in (1, 3):
        arguments = [str(run), str(tmp_path), str(tmp_path / f"{ranks}"), *names]
        code, output = run_ranks("tests.helpers.task_cases", arguments, ranks, tmp_path / f"log{ranks}")
        assert code == 0, output
    for name in names:
        results = [json.loads((tmp_path / f"{ranks}/{name}/result.json").read_text()) for ranks in (3, 1)]
        _assert_close(*results, name)


def _fields(value):
    """Yield the names of the fields of a result and of its rows, in the form that the guide uses."""
    for name, inner in value.items():
        name = re.sub(r"^(other_)?(max_softmax|energy|knn|mahalanobis)_(?!samples)", "SET_SCORE_", name)
        yield re.sub(r"^other_samples$", "SET_samples", name).removesuffix("_se")
        if name in ("baselines", "differences") and isinstance(inner, dict):
            for each in inner.values():
                yield from _fields(each)
        if name in ("recipe", "difference", "options", "with_hog") or (
            isinstance(inner, list) and inner and isinstance(inner[0], dict)
        ):
            for row in inner if isinstance(inner, list) else [inner]:
                yield from _fields(row)


def test_the_guide_lists_exactly_the_fields_of_a_result(single_rank):
    guide = (ROOT / "docs/guide/evaluation-results.md").read_text()
    (section,) = re.findall(r"## Fields of result.json\n(.*?)\n## ", guide, re.DOTALL)
    table = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    named = {name.removesuffix("_se") for _, fields in table for name in re.findall(r"`([A-Za-z0-9_]+)`", fields)}
    results = [json.loads((single_rank[1] / name / "result.json").read_text()) for name in task_cases.CASES]
    found = {name for result in results for name in _fields(result)}
    assert found - named == set()
    rare = {"top5", "chance_top5", "auroc", "warnings", "name"}  # not in the results of three classes
    words = {"SCORE", "SET_", "attentive", "ood_samples", "max_softmax", "energy", "knn", "mahalanobis"}
    assert named - found - rare - words == set()
