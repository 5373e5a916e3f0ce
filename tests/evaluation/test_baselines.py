"""The baselines that a representation has to exceed: the share of the largest class, random weights, and the pixels
themselves."""

import json
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet, write_parquet
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import ModelConfig
from m3ae_fast.evaluation import encoding
from m3ae_fast.evaluation.baselines import MODEL, PREFIXES, SCALED, UNTRAINED, accuracy_entries
from m3ae_fast.evaluation.difference import against_largest_class
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.evaluation.significance import Difference, difference
from m3ae_fast.evaluation.tasks import Options
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pixel_baseline import SIDE, Pixels
from tests.evaluation.conftest import settings
from tests.helpers import task_cases
from tests.helpers.labelled import labelled_members, labelled_tar
from tests.helpers.shards import write_tar
from tests.helpers.trainer import TINY

FINETUNE = settings("finetune.steps=2", "finetune.global_batch=16", "finetune.rand_augment=null")
SHORT = settings("linear.steps=4", "linear.peak_lr=1", "linear.global_batch=16", "linear.warmup_epochs=0")
SKEWED = {number: int(number % 9 == 0) for number in range(18)}  # two classes with 16 and 2 samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("knn", ()),
        ("logistic", ()),
        ("linear", SHORT),
        ("linear", ("--layers", "1", *SHORT)),
        ("finetune", FINETUNE),
    ],
)
def test_every_result_contains_the_fraction_of_the_largest_class(transfer, tmp_path, task, options, capsys):
    """The result also states whether the accuracy is significantly above that share."""
    shard = labelled_tar(tmp_path / "a.tar", range(18), SKEWED)
    result = transfer(task, *options, train=shard, val=shard)
    assert result["chance"] == pytest.approx(16 / 18) and "chance_top5" not in result
    table = read_parquet(tmp_path / "out/predictions.parquet")
    above = np.mean(np.array(table["label"]) == table["prediction"]) - 16 / 18
    assert f"the largest class on these samples: {100 * above:+.1f} points" in result["verdict"]
    assert f"{task}: {result['verdict']}\n" in capsys.readouterr().out


def test_the_largest_class_is_determined_from_the_evaluated_samples(tmp_path):
    labels = [0] * 40 + [1] * 20 + [2] * 15 + [3] * 10 + [4] * 8 + [5] * 7
    keys = [*map(str, range(100))]

    def entries(predictions, keys=keys):
        write_parquet(tmp_path / "predictions.parquet", {"key": keys, "label": labels, "prediction": predictions})
        return against_largest_class(tmp_path, {})

    found = entries(labels)
    assert (found["chance"], found["chance_top5"]) == (0.4, pytest.approx(0.93))
    assert found["verdict"].startswith("the model is better than the largest class: +60.0 points, 95 % interval")
    assert entries([1] * 100)["verdict"].startswith("the model is worse than the largest class: -20.0 points")
    assert entries([0] * 100)["verdict"].startswith("the model does not differ significantly from the largest class")
    assert "verdict" not in entries(labels, ["0", *keys[:-1]])  # a sample with several predictions
    write_parquet(tmp_path / "predictions.parquet", {"key": keys, "score": labels})
    assert against_largest_class(tmp_path, {}) == {} == against_largest_class(tmp_path / "nothing", {})


@pytest.mark.parametrize(
    "settings", [{}, {"resize": "native"}, {"channels": 1, "image_mean": [0.4], "image_std": [0.2]}]
)
def test_the_pixel_baseline_downscales_the_input_of_the_model(settings):
    config = ModelConfig.model_validate({**TINY["model"], "vocab_size": 0, **settings}, strict=False)
    sizes = [(16, 32), (32, 16), (32, 32)] if settings.get("resize") else [(32, 32)] * 3
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (config.channels, *s), dtype=torch.uint8, generator=generator) for s in sizes]
    samples = [unmasked_sample(i, image, None, config, None) for i, image in enumerate(images)]
    pixels = Pixels(config)
    found = pixels.pooled_of_layers(pack(samples, pixels.geometry), [1, 2])
    assert found.shape == (3, 2, config.channels * SIDE**2) and torch.equal(found[:, 0], found[:, 1])
    assert pixels.pooled_of_layers(pack([], pixels.geometry), [1]).shape == (0, 1, found.shape[2])
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    for feature, sample in zip(found[:, 0], samples):
        seen = (sample.image / 255 - mean) / std
        expected = F.interpolate(seen[None], (SIDE, SIDE), mode="bicubic", antialias=True).flatten()
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)


def test_patch_features_of_the_pixel_baseline_are_its_pixels():
    config = ModelConfig.model_validate({**TINY["model"], "vocab_size": 0}, strict=False)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels, P = Pixels(config), config.patch_size
    batch = pack([unmasked_sample(0, image, None, config, None)], pixels.geometry)
    pooled, patches = pixels.pooled_and_patches(batch, [1])
    assert torch.equal(pooled, pixels.pooled_of_layers(batch, [1]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    seen, across = (image / 255 - mean) / std, 32 // P
    assert patches.shape == (1, 1, across**2, 3 * P**2)
    for row in range(across):
        for column in range(across):
            own = seen[:, row * P : (row + 1) * P, column * P : (column + 1) * P]
            torch.testing.assert_close(patches[0, 0, row * across + column], own.flatten(), rtol=0, atol=1e-5)
    none = pixels.pooled_and_patches(pack([], pixels.geometry), [1])[1]
    assert none.shape == (0, 1, across**2, 3 * P**2)


@pytest.mark.slow
def test_the_pixel_baseline_classifies_colours(transfer, run, capsys):
    longer = [*SHORT, *settings("linear.steps=100", "linear.peak_lr=30")]
    for task, options in (("knn", []), ("linear", longer), ("linear", ["--shots", "5,9", *longer])):
        result = transfer(task, *options, model=f"pixels:{run}", out=f"{task}{len(options)}")
        assert result["top1"] > 0.9 and result["model"] == f"pixels:{run}"
    assert " layers" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "options"),
    [
        ("knn", "top1", ()),
        ("logistic", "top1", ()),
        ("multilabel", "map", ("--labels", "json.tags")),
        ("segment", "miou", settings("segment.head=knn", "segment.bank_patches=300")),
        ("segment", "miou", settings("segment.steps=5", "segment.batch=8")),
    ],
)
def test_baselines_have_the_results_of_their_separate_evaluations(
    transfer, run, tmp_path, task, metric, options, capsys, monkeypatch
):
    """They are encoded in the same pass, and have the bits of their own evaluations."""
    task_cases.write_data(tmp_path)
    opened, loader = [], encoding.encoding_loader
    monkeypatch.setattr(encoding, "encoding_loader", lambda *given: opened.append(given[1]) or loader(*given))
    shards = {"train": str(tmp_path / "train.tar"), "val": str(tmp_path / "val.tar")}
    options = (*options, *settings("data.max_bad_fraction=0.2"))  # some images cannot be read
    result = transfer(task, *options, baselines=True, **shards)
    assert len(opened) == 2 and [*result["baselines"]] == [UNTRAINED, SCALED]
    output, verdicts = capsys.readouterr().out, []
    for name, prefix in PREFIXES.items():
        alone = transfer(task, *options, model=f"{prefix}{run}", out=prefix[:3], baselines=True, **shards)
        found = result["baselines"][name]
        assert "baselines" not in alone
        assert {key: value for key, value in found.items() if key != "difference"} == {
            key: value for key, value in alone.items() if key in found
        }
        if task == "multilabel":  # all scores are perfect, so that no error can be estimated
            assert found == {"map": 1.0} and f"\n{task}: {name}: map 1\n" in output and name in result["warning"]
            continue
        apart = Difference.read(found["difference"])
        assert apart.value == pytest.approx(result[metric] - alone[metric])
        assert f"{task}: {name}: {metric} {alone[metric]:.4f} ± " in output
        assert f"; {apart.words('the model', name)}\n" in output
        if metric == "top1":
            tables = [read_parquet(tmp_path / out / "predictions.parquet") for out in ("out", prefix[:3])]
            assert apart == difference(*(np.equal(each["label"], each["prediction"]) for each in tables))
        assert (name in result.get("warning", "")) != apart.is_better
        verdicts.append(escape(f"{task}: {apart.words(str(run), name)}."))
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<br>".join(verdicts) in page
    for name in PREFIXES:
        assert f"<td>{name} of {run}</td><td>{metric}</td>" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options", "alone"),
    [
        ("linear", SHORT, ("logistic",)),
        ("finetune", FINETUNE, ("logistic",)),
        ("attentive", settings("attentive.steps=3"), ("logistic",)),
        ("attentive", settings("attentive.steps=3", "attentive.online=true"), ("logistic",)),
        ("knn", ("--layers", "all"), ("knn",)),
        ("logistic", ("--pools", "cls,mean"), ("logistic", *settings("encode.pool=cls"))),
        ("linear", ("--shots", "2,5", "--draws", "2", *SHORT), ("logistic", "--shots", "2,5", "--draws", "2")),
        ("knn", ("--shots", "2,5", "--draws", "2"), ("knn", "--shots", "2,5", "--draws", "2")),
    ],
)
def test_baselines_of_trained_heads_and_of_grids_use_logistic_regression(
    transfer, run, tmp_path, task, options, alone, capsys
):
    """They have the results of logistic regression (of k-NN for k-NN) on the same training samples."""
    result = transfer(task, *options, baselines=True)
    output = capsys.readouterr().out
    assert [*result["baselines"]] == [UNTRAINED, SCALED]
    for name, prefix in PREFIXES.items():
        other, found = transfer(*alone, model=f"{prefix}{run}", out=prefix[:3]), result["baselines"][name]
        assert found.get("probe", "") == ("" if alone[0] == task else "logistic regression")
        probe = "" if alone[0] == task else " (logistic regression)"
        assert f"{task}: {name}{probe}: top1 {found['top1']:.4f} ± " in output
        assert (found["top1"], found["top1_se"]) == (other["top1"], other["top1_se"])
        assert {*found} <= {"probe", "top1", "top1_se", "difference", "k", "inverse_strength"}
        apart = Difference.read(found["difference"])
        assert apart.value == pytest.approx(result["top1"] - found["top1"])
        assert (name in result.get("warning", "")) != apart.is_better


@pytest.mark.slow
def test_a_stop_during_the_baselines_keeps_the_result(transfer, run, monkeypatch, capsys):
    encode = Job.encode_baselines

    def stopped(job, *given):
        job.stop.request("SIGTERM")
        return encode(job, *given)

    monkeypatch.setattr(Job, "encode_baselines", stopped)
    result = transfer("linear", *SHORT, baselines=True)
    assert result["steps"] == 4 and "top1" in result and "baselines" not in result
    assert "note: the result is written without baselines: stopped (SIGTERM)" in capsys.readouterr().out


@pytest.mark.slow
def test_samples_that_become_unreadable_for_the_baselines_do_not_prevent_the_result(transfer, tmp_path, capsys):
    members = [(name, data[:200] if name == "00047.png" else data) for name, data in labelled_members(range(48))]
    options = settings("linear.steps=1", "linear.peak_lr=1", "linear.global_batch=16", "data.max_bad_fraction=0")
    result = transfer("linear", *options, train=write_tar(tmp_path / "train.tar", members), baselines=True)
    assert result["steps"] == 1 and "top1" in result and "baselines" not in result
    assert "note: the result is written without baselines: 1 of 48 samples cannot be used" in capsys.readouterr().out


@pytest.mark.slow
def test_baselines_of_a_grid_use_the_layer_of_its_main_accuracy(transfer, monkeypatch):
    pooled, layers = M3AE.pooled_of_layers, []

    def spied(model, batch, numbers, *more):
        layers.append(list(numbers))
        return pooled(model, batch, numbers, *more)

    monkeypatch.setattr(M3AE, "pooled_of_layers", spied)
    transfer("knn", "--layers", "1", baselines=True)
    assert layers == [[1]] * 4  # training and held-out samples of the model and of random weights


def test_a_report_names_the_probe_of_the_baselines(tmp_path):
    """A separate evaluation of random weights with the task's own classifier is compared as well."""
    keys, better = [*map(str, range(50))], Difference(0.4, 0.3, 0.5, 0.01).entries()
    results = {
        "tuned": ("finetune", "m", {"verdict": "", "baselines": {UNTRAINED: {"probe": "probe", "difference": better}}}),
        "scratch": ("finetune", f"{PREFIXES[UNTRAINED]}m", {"verdict": ""}),
        "grid": ("knn", "m", {"baselines": {SCALED: {"top1": 0.5, "difference": better}}}),
    }
    for name, (task, model, more) in results.items():
        own = keys * 2 if name == "grid" else keys  # a grid has several predictions for each sample
        columns = {"key": own, "label": [0] * len(own), "prediction": [int(name == "scratch")] * len(own)}
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "predictions.parquet", columns)
        (tmp_path / name / "result.json").write_text(json.dumps({"task": task, "model": model} | more))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"finetune: m is better than {UNTRAINED} (probe): +40.0 points" in page
    assert f"finetune: m is better than {UNTRAINED}: +100.0 points" in page
    assert f"knn: m is better than {SCALED}: +40.0 points" in page


@pytest.mark.slow
def test_baselines_are_skipped_on_request_and_if_they_would_be_meaningless(transfer, run, tmp_path, capsys):
    cases = {
        "request": ((), {"baselines": False}),
        "text": (("--modality", "paired"), {"baselines": True}),
    }
    for out, (options, more) in cases.items():
        assert "baselines" not in transfer("knn", *options, out=out, **more), out
        assert UNTRAINED not in capsys.readouterr().out
    with pytest.raises(UserError, match="--no-baselines: ood does not use it; leave it out"):
        Options("ood", [str(run)], ["a.tar"], ["a.tar"], baselines=False)


def test_a_warning_names_each_baseline_that_is_not_exceeded(tmp_path):
    keys, labels = [*map(str, range(100))], [0] * 60 + [1] * 40
    apart = Difference(-0.3, -0.4, -0.2, 0.01), Difference(0.2, 0.1, 0.3, 0.01)
    good, poor = ({"top1": 0.8, "difference": each.entries()} for each in apart)

    def warned(predictions, **baselines):
        write_parquet(tmp_path / "predictions.parquet", {"key": keys, "label": labels, "prediction": predictions})
        return against_largest_class(tmp_path, {"baselines": baselines}).get("warning")

    assert warned(labels, a=poor) is None
    output = "the model is not significantly better than b: top-1 accuracy 100.0%, b 80.0%"
    assert warned(labels, a=poor, b=good) == output
    assert warned([0] * 100, a=good, b=good) == (
        "the model is not significantly better than the largest class, a and b: top-1 accuracy 60.0%, largest class "
        "60.0%, a 80.0%, b 80.0%"
    )


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("attentive", (), "attentive does not accept pixels; knn, logistic, linear, multilabel and segment do"),
        ("finetune", (), "finetune does not accept pixels; knn, logistic, linear, multilabel and segment do"),
        (
            "knn",
            ("--modality", "paired"),
            "the pixel baseline has features of images, not of captions; leave out --modality",
        ),
        (
            "knn",
            ("--layers", "1"),
            "no poolings and no checkpoints; leave out --layers, --pools and --resume",
        ),
        ("knn", ("--pools", "cls"), "pixels have no layers, no poolings and no checkpoints"),
        ("linear", ("--resume", "auto"), "pixels have no layers, no poolings and no checkpoints"),
    ],
)
def test_tasks_that_the_pixel_baseline_does_not_support_are_refused(transfer, run, tmp_path, task, options, message):
    with pytest.raises(UserError, match=message):
        transfer(task, *options, model=f"pixels:{run}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples", [1, 2])
def test_the_difference_from_a_baseline_is_undefined_for_a_single_sample(samples):
    """The bootstrap samples of one sample are all equal."""
    keys, labels_N = [f"{number}" for number in range(samples)], torch.zeros(samples, dtype=torch.int64)
    right, wrong = (Predictions.of(keys, labels_N, torch.tensor([row] * samples)) for row in ([2.0, 1.0], [1.0, 2.0]))
    entries = accuracy_entries({MODEL: wrong, UNTRAINED: right}, {})["baselines"][UNTRAINED]
    assert entries["top1"] == 1 and ("difference" in entries) == (samples > 1)
    other = replace(right, keys=[*keys[1:], "another"])  # such as after a read error that only one of the two had
    assert "difference" not in accuracy_entries({MODEL: wrong, UNTRAINED: other}, {})["baselines"][UNTRAINED]
