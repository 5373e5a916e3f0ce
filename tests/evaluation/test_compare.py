"""The comparison of models on a dataset, and of results."""

import json
import re
import shutil
from itertools import combinations

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from pyarrow import parquet
from scipy import stats

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.cli.evaluate import main
from m3ae_fast.evaluation import compare, ood
from m3ae_fast.evaluation.baseline_results import LARGEST, UNTRAINED
from m3ae_fast.evaluation.compare import ComparedPredictions, model_names
from m3ae_fast.evaluation.compare_results import compare_results
from m3ae_fast.evaluation.image_features import available
from m3ae_fast.evaluation.ood import SCORES
from m3ae_fast.evaluation.significance import difference
from m3ae_fast.heads import attentive_online
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.weights.model_name import IMAGE_FEATURES, PIXELS
from tests.evaluation.conftest import figure_names, same_as_baseline, settings
from tests.helpers.labelled import tiny_run

pytestmark = pytest.mark.slow

SHORT = settings("attentive.steps=4", "attentive.batch=16", "attentive.peak_lr=0.001", "encode.precision=fp32")


def _short(task):
    """Return the settings in SHORT that a task has."""
    return settings(*(each for each in SHORT[1::2] if each.startswith((task, "encode"))))


SCALED = IMAGE_FEATURES[PIXELS]


@pytest.fixture
def compared(run, shards, tmp_path):
    """Return a function of options that compares an M3AE with an image-only model, `mae`, and returns the content of
    result.json."""
    torch.manual_seed(1)
    mae = tiny_run(tmp_path / "mae", vocab_size=0)

    def perform(*options, models=(run, mae), short=SHORT):
        data = ["--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out"), "--set", "data.workers=0"]
        assert main(["compare", *map(str, models), *data, *short, *options]) == 0
        return json.loads((tmp_path / "out/result.json").read_text())

    return perform


def test_models_are_compared_by_probes_and_seeds(compared, run, shards, tmp_path, capsys):
    result = compared("--seeds", "2")
    features = [IMAGE_FEATURES[name] for name in available()[0]]
    models, probes = [UNTRAINED, *features, run.name, "mae"], ["knn", "logistic", "attentive"]
    rows = {(row["model"], row["probe"]): row for row in result["rows"]}
    done = [(model, probe) for model in models for probe in probes]
    # features without a network have no patch tokens
    done = [pair for pair in done if pair not in {(name, "attentive") for name in features}]
    assert list(rows) == done
    assert {row["trials"] for (model, probe), row in rows.items() if probe == "attentive"} == {2}
    trials = [rows[model, "knn"]["trials"] for model in models]
    assert trials == [2, *[1] * (len(models) - 1)]  # k-NN has no random draws
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for (model, probe), row in rows.items():
        own = table[(table.model == model) & (table.probe == probe)]
        assert row["top1"] == pytest.approx((own.label == own.prediction).mean())
    assert [(test["probe"], test["first"], test["second"]) for test in result["tests"]] == [
        (probe, first, second)
        for probe in probes
        for second, first in combinations([LARGEST, *(model for model, own in done if own == probe)], 2)
    ]
    assert figure_names(tmp_path / "out") == ["comparison"] and result["chance"] == pytest.approx(1 / 3)
    page = (tmp_path / "out/comparison.md").read_text()
    output = capsys.readouterr().out
    cell = rows["mae", "attentive"]
    assert page in output and f"{100 * cell['top1']:.1f} ± {100 * cell['top1_se']:.1f}" in page
    assert "- knn: mae " in page and f"{len(models)} of {len(models)} models done" in output
    for name in features:
        assert re.search(rf"\n\| {name} \| ([\d.]+ ± [\d.]+ \| ){{2}}- \|\n", page)

    first = result["config"]["run"]["seed"]
    random = table[(table.model == UNTRAINED) & (table.probe == "knn")].groupby("seed").score
    one, other = (scores.tolist() for _, scores in random)
    assert [*random.groups] == [first, first + 1] and one != other, "each seed has weights of its own"
    other = settings(f"run.seed={first + 1}")
    for name, task, seed, options in (("mae", "knn", first, []), (run.name, "attentive", first + 1, other)):
        model = str(run if name == run.name else tmp_path / "mae")
        data = ["--train", shards[0], "--val", shards[1], "--out", str(tmp_path / task), "--set", "data.workers=0"]
        assert main([task, model, *data, *_short(task), *options]) == 0
        alone = parquet.read_table(tmp_path / task / "predictions.parquet").to_pandas()
        own = table[(table.model == name) & (table.probe == task) & (table.seed == seed)]
        assert alone.score.tolist() == own.score.tolist(), "each score is bitwise equal to that of the separate task"


def test_an_interrupted_comparison_continues_with_the_probe_that_was_interrupted(
    compared, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "available", lambda: ([], ""))
    options, encoded = ("--probes", "knn,attentive", "--seeds", "2"), []
    add, encode = ComparedPredictions.add, compare.encode_types

    def perform(*more):
        encoded.clear()
        return compared(*options, *more, models=[run], short=_short("attentive"))

    def interrupted(*more):
        added = []

        def stop_at_the_sixth(found, *given):
            added.append(given)
            if len(added) == 6:  # random weights have four trials, and the model has three
                raise KeyboardInterrupt
            add(found, *given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ComparedPredictions, "add", stop_at_the_sixth)
            perform(*more)

    monkeypatch.setattr(compare, "encode_types", lambda *given, **more: encoded.append(1) or encode(*given, **more))
    expected = perform()
    assert len(encoded) == 6 and not (tmp_path / "out/trials").exists()
    shutil.rmtree(tmp_path / "out")
    interrupted(*settings("knn.k=3"))
    interrupted()  # the stored predictions are not used, because the settings have changed
    assert len(encoded) == 6 and len([*(tmp_path / "out/trials").iterdir()]) == 10
    capsys.readouterr()
    found = perform()
    assert "5 probes were completed by an earlier call, whose predictions are used" in capsys.readouterr().out
    assert len(encoded) == 2 and not (tmp_path / "out/trials").exists()
    assert [found[name] for name in ("rows", "tests")] == [expected[name] for name in ("rows", "tests")]


def test_each_seed_of_an_online_probe_has_samples_in_another_order(compared, run, monkeypatch):
    """The order of a seed is the same for all models."""
    orders, loader = [], attentive_online.train_loader

    def seen(*given, **more):
        orders.append([key for batch in loader(*given, **more) for key in batch.keys])
        return loader(*given, **more)

    monkeypatch.setattr(attentive_online, "train_loader", seen)
    short = settings("attentive.steps=3", "attentive.batch=16", "attentive.peak_lr=0.001", "attentive.online=true")
    compared("--seeds", "2", "--probes", "attentive", models=[run], short=short)
    assert len(orders) == 4 and orders[:2] == orders[2:] and orders[0] != orders[1]


def _found(**correct):
    """Return the comparison for one probe. `correct`: for each model, a row per seed, which says for each sample
    whether it is classified correctly."""
    found, keys = ComparedPredictions([0, 1]), [str(i) for i in range(100)]
    for model, rows in correct.items():
        for seed, right in enumerate(rows):
            best_NK = torch.from_numpy(~np.asarray(right)).long()[:, None]
            found.add(model, "knn", seed, Predictions(keys, torch.zeros(100).long(), best_NK, torch.ones(100)))
    return found


def test_a_sample_that_is_correct_for_half_of_the_seeds_counts_for_neither_model():
    even, other = np.full(20, 0.5), np.arange(20) % 2 == 0
    assert difference(even, other).p == difference(other, even).p == 1.0  # both models are right equally often
    # correct on the first nine samples; on five of these, `other` is correct too
    mixed = np.where(np.arange(20) < 9, 1.0, even)
    assert difference(mixed, other).p == difference(other, mixed).p == stats.binomtest(0, 4).pvalue


def test_significance_tests_are_paired_by_sample_on_means_over_seeds():
    generator = np.random.default_rng(0)
    good, poor = generator.random((2, 100)) < 0.9, generator.random((1, 100)) < 0.5
    found = _found(poor=poor, good=good)
    of_poor, of_good, (probe, first, second, test) = found.tests()
    assert (probe, first, second) == ("knn", "good", "poor")
    for (_, *names, against), name, right in ((of_poor, "poor", poor), (of_good, "good", good)):
        # all samples have one class
        assert names == [name, LARGEST] and against == difference(right.mean(0), np.ones(100))
    assert test == difference(good.mean(0), poor[0].astype(float)) and test.is_significant
    decided = good[0] == good[1]
    theirs = stats.binomtest(
        int((good[0] & ~poor[0] & decided).sum()), int(((good[0] != poor[0]) & decided).sum())
    ).pvalue
    assert test.p == pytest.approx(theirs)
    assert "- knn: good is better than poor" in found.page()
    assert "- knn: good is worse than the largest class: -1" in found.page()
    assert found.result()["rows"][1]["top1"] == pytest.approx(good.mean())
    assert found.result()["chance"] == 1.0  # all samples belong to the same class
    assert "the largest class has 100.0 % of the samples" in found.page()


def test_a_warning_names_the_baselines_that_a_model_does_not_exceed():
    """Baselines are compared with the largest class, to which all samples belong here, but not with each other."""
    right = {UNTRAINED: [np.arange(100) < 60], SCALED: [np.arange(100) < 20], "m": [np.arange(100) < 62]}
    largest = "is not significantly better than the largest class"
    assert [*_found(**right).warnings()] == [
        ("knn", f"{UNTRAINED} {largest}: top-1 accuracy 60.0%, largest class 100.0%"),
        ("knn", f"{SCALED} {largest}: top-1 accuracy 20.0%, largest class 100.0%"),
        ("knn", f"m {largest} and random weights: top-1 accuracy 62.0%, largest class 100.0%, random weights 60.0%"),
    ]


def test_models_are_named_by_the_part_of_the_path_that_differs():
    own = {"a": "runs/a", "b": "runs/b"}
    names = {UNTRAINED: "random:runs/a", SCALED: "pixels", "HOG": "hog"} | own
    assert model_names(["runs/a", "runs/b"], ["pixels", "hog"]) == names
    assert model_names(["runs/a", "runs/b"], []) == {UNTRAINED: "random:runs/a"} | own
    assert list(model_names(["x/run", "y/run"], ["pixels"])) == [UNTRAINED, SCALED, "x/run", "y/run"]
    assert model_names(["random:x"], []) == {UNTRAINED: "random:x", "random:x": "random:x"}
    with pytest.raises(UserError, match="histogram: compare always includes this baseline; leave it out"):
        model_names(["a", "histogram"], [])
    with pytest.raises(UserError, match="the same model is given twice"):
        model_names(["a", "a"], [])


def test_user_errors_are_reported_before_anything_is_encoded(compared, run, tmp_path):
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        compared(models=(run, tmp_path / "nothing"))
    with pytest.raises(
        UserError, match=r"train.epochs: compare does not use this setting; it uses only the sections encode, knn, run"
    ):
        compared("--probes", "knn", "--set", "train.epochs=3", short=())
    for options, message in (
        (["--probes", "knn,svm"], "--probes svm: must be knn, logistic or attentive"),
        (["--seeds", "0"], "--seeds 0: must be "),
    ):
        with pytest.raises(UserError, match=message):
            compared(*options)
    assert not (tmp_path / "out").exists()


def test_significant_and_insignificant_differences_between_results_are_reported(
    transfer, run, shards, tmp_path, capsys
):
    transfer("knn", out="one")
    transfer("knn", model=f"random:{run}", out="other")
    capsys.readouterr()
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert main(["compare", *folders]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{folders[0]} ") and folders[1] in output and "McNemar p = " in output
    transfer("knn", val=shards[0], out="elsewhere")
    with pytest.raises(UserError, match=r"are of different samples \(66 samples in only one of the two\)"):
        main(["compare", folders[0], str(tmp_path / "elsewhere")])
    compared_models = tmp_path / "compared"
    columns = {"key": ["a", "a"], "label": [1, 1], "prediction": [1, 1], "model": ["m", "n"]}
    write_parquet(compared_models / "predictions.parquet", columns)
    with pytest.raises(UserError, match="compared: does not contain exactly one class prediction per sample"):
        main(["compare", folders[0], str(compared_models)])
    with pytest.raises(
        UserError, match=r"nowhere: has no predictions.parquet; to compare results, specify the folders"
    ):
        main(["compare", folders[0], str(tmp_path / "nowhere")])


def test_each_pair_of_results_is_compared_and_results_of_robustness_for_each_attack(tmp_path):
    keys, right = [*map(str, range(40))], [0] * 40
    for name, wrong in (("a", 0), ("b", 8), ("c", 20)):
        found = [1] * wrong + [0] * (40 - wrong)
        columns = {"key": keys * 2, "label": right * 2, "prediction": right + found}
        conditions = ["clean"] * 40 + ["pgd 1/255"] * 40
        write_parquet(tmp_path / name / "predictions.parquet", columns | {"condition": conditions})
        write_parquet(tmp_path / f"{name}1" / "predictions.parquet", {"key": keys, "label": right, "prediction": found})
    folders = [tmp_path / name for name in "abc"]
    lines = compare_results([tmp_path / f"{name}1" for name in "abc"]).splitlines()
    attacked = compare_results(folders).splitlines()
    assert len(lines) == 3 and f"{folders[0]}1 is better than {folders[1]}1: +20.0 points" in lines[0]
    assert attacked[1::2] == [f"pgd 1/255: {line}".replace("1 is ", " is ").replace("1: ", ": ") for line in lines]
    for line, (one, other) in zip(attacked[::2], combinations(folders, 2)):
        assert line.startswith(f"clean: {one} does not differ significantly from {other}")
    with pytest.raises(UserError, match="only one of them contains clean, pgd 1/255; choose two"):
        compare_results([tmp_path / "a", tmp_path / "a1"])
    with pytest.raises(UserError, match="a: cannot be compared alone; to compare results, specify the folders"):
        main(["compare", str(tmp_path / "a")])
    for option in (["--train", "a.tar"], ["--set", "knn.k=1"]):
        with pytest.raises(UserError, match="is needed to compare models; to compare results, specify only"):
            main(["compare", *map(str, folders), *option])


@pytest.mark.parametrize("grid", [("--layers", "1,2"), ("--layers", "1,2", "--pools", "all", "--shots", "2,4")])
def test_the_main_accuracies_of_grids_are_compared_as_those_of_a_model_and_its_baseline(transfer, tmp_path, grid):
    case = "layer 2, mean, 4 shots" if "--shots" in grid else "layer 2, mean"
    line, expected = same_as_baseline(transfer, tmp_path, "knn", *grid)
    for name in ("one", "other"):
        expected = expected.replace(str(tmp_path / name), f"{tmp_path / name} ({case})")
    assert line == expected
    transfer("knn", *settings("run.seed=0"), out="alone")
    line = compare_results([tmp_path / "alone", tmp_path / "one"])
    assert line.startswith(f"{tmp_path / 'alone'} ") and f" {tmp_path / 'one'} ({case})" in line
    if "--shots" not in grid:  # the main accuracy is that of the last layer
        assert "+0.0 points, 95 % interval +0.0 to +0.0" in line


def test_results_with_different_metrics_are_not_compared(tmp_path):
    keys, counts = ["a", "b"], [[1, 2], [3, 4]]
    tables = {
        "classes": {"label": [0, 1], "prediction": [0, 1]},
        "masks": {"class_pixels": counts, "class_predicted": counts, "class_right": counts},
        "lists": {"truth": [[True, False], [False, True]], "scores": [[1.0, 0.0], [0.0, 1.0]]},
    }
    for name, columns in tables.items():
        write_parquet(tmp_path / name / "predictions.parquet", {"key": keys} | columns)
    with pytest.raises(UserError, match="are measured by different metrics, accuracy and mIoU; choose results with"):
        compare_results([tmp_path / "classes", tmp_path / "masks"])
    with pytest.raises(UserError, match="are measured by different metrics, mIoU and mAP; choose results with"):
        compare_results([tmp_path / "masks", tmp_path / "lists"])
    one = {name: values[:1] for name, values in ({"key": keys} | tables["masks"]).items()}
    for name in ("first", "second"):
        write_parquet(tmp_path / name / "predictions.parquet", one)
    assert "no interval can be estimated; use more --val samples" in compare_results(
        [tmp_path / "first", tmp_path / "second"]
    )


def test_results_of_different_labels_are_not_compared(tmp_path):
    """Results that differ only in the names of the classes are compared. Merged classes are different classes."""
    keys, site, colour = list("abcdef"), list("nsnsns"), [0, 1, 2, 0, 1, 2]
    named = {"named": ["red", "green", "blue"] * 2, "joined": ["warm", "cold", "cold"] * 2}
    for name, labels in {"colour": colour, "site": site, **named}.items():
        write_parquet(tmp_path / name / "predictions.parquet", {"key": keys, "label": labels, "prediction": labels})
    assert "does not differ significantly" in compare_results([tmp_path / "colour", tmp_path / "named"])
    for pair in (("colour", "site"), ("colour", "joined"), ("joined", "colour")):
        with pytest.raises(
            UserError, match="the samples have different classes; choose results with the same --labels"
        ):
            compare_results([tmp_path / name for name in pair])


def test_predictions_without_a_class_are_refused(tmp_path):
    for name, prediction in (("one", [1, 2]), ("other", [1, None])):
        columns = {"key": ["a", "b"], "label": [1, 2], "prediction": prediction}
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name / "predictions.parquet")
    with pytest.raises(UserError, match="other: does not contain exactly one class prediction per sample"):
        main(["compare", str(tmp_path / "one"), str(tmp_path / "other")])


def test_results_are_compared_independently_of_the_order_of_their_samples(tmp_path, monkeypatch):
    """Samples are matched by key, separately for each set."""
    monkeypatch.setattr(ood, "BOOTSTRAPS", 20)
    random = np.random.RandomState(0)
    keys = [f"{i:02}" for i in range(40)]
    classes = {"label": random.randint(3, size=40), "prediction": random.randint(3, size=40)}
    scores = {"set": np.repeat(["val", "a", "b"], [20, 12, 8])} | {score: random.rand(40) for score in SCORES}
    for columns, lines in ((classes, 1), (scores, 2 * len(SCORES))):
        for name, order in (("one", np.arange(40)), ("other", random.permutation(40))):
            table = {"key": [keys[i] for i in order]} | {name: own[order].tolist() for name, own in columns.items()}
            write_parquet(tmp_path / name / "predictions.parquet", table)
        sentences = compare_results([tmp_path / "one", tmp_path / "other"]).splitlines()
        assert len(sentences) == lines
        for line in sentences:
            assert re.search(
                r"does not differ significantly .*\+0\.0+( points)?, 95 % interval \+0\.0+ to \+0\.0+\b", line
            ), line
