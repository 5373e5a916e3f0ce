"""The baselines that a representation has to exceed: the fraction of the largest class, random weights, and the pixels
themselves."""

import io
import json
import re
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet, write_parquet
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import DataConfig, ModelConfig
from m3ae_fast.evaluation import image_features, labelled_task, task_features
from m3ae_fast.evaluation.baseline_results import LARGEST, MODEL, UNTRAINED, accuracy_entries, baseline_models
from m3ae_fast.evaluation.compare_results import against_largest_class
from m3ae_fast.evaluation.image_features import SIDE, Histogram, OrientedGradients, Pixels, available, input_config
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.evaluation.significance import Difference, difference
from m3ae_fast.evaluation.tasks import Ood
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.images.bands import write_npy
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.pretraining.final_evaluation import RUN, STARTED, verdict
from m3ae_fast.weights.model_name import IMAGE_FEATURES, PIXELS
from tests.evaluation.conftest import settings
from tests.helpers import task_cases
from tests.helpers.labelled import coloured, labelled_members, labelled_tar, tiny_run
from tests.helpers.shards import write_tar
from tests.helpers.trainer import TINY

SCALED = IMAGE_FEATURES[PIXELS]
FEATURES = [IMAGE_FEATURES[name] for name in available()[0]]  # HOG needs a library
FINETUNE = settings("train.steps=2", "train.global_batch=16", "finetune.rand_augment=null")
SHORT = settings("train.steps=4", "optim.peak_lr=1", "train.global_batch=16", "optim.warmup_epochs=0")
SKEWED = {number: int(number % 9 == 0) for number in range(18)}  # two classes with 16 and 2 samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("knn", ()),
        ("logistic", ()),
        ("linear", SHORT),
        ("logistic", ("--layers", "1")),
        ("finetune", FINETUNE),
    ],
)
def test_every_result_contains_the_fraction_of_the_largest_class(transfer, tmp_path, task, options, capsys):
    """The result also states whether the accuracy is significantly above that fraction."""
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


def _features(kind, images, **settings):
    """Return the features [S, D] of images, uint8 or normalised float32 [S, C, H, W]."""
    size, channels = images.shape[-1], images.shape[1]
    model = {**TINY["model"], "vocab_size": 0, "image_size": size, "patch_size": size // 2, "channels": channels}
    config = ModelConfig.model_validate(
        {"image_mean": [0.4] * channels, "image_std": [0.2] * channels} | model | settings, strict=False
    )
    features = kind(config)
    batch = pack([unmasked_sample(i, image, None, config, None) for i, image in enumerate(images)], features.geometry)
    found = features.pooled_of_layers(batch, [1, 2])
    assert found.shape == (len(images), 2, features.width) and torch.equal(found[:, 0], found[:, 1])
    assert features.pooled_of_layers(pack([], features.geometry), [1]).shape == (0, 1, features.width)
    return found[:, 0]


def _images(channels, size=48, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_pixel_baseline_downscales_the_normalised_image(channels):
    images = _images(channels)
    seen = (images / 255 - 0.4) / 0.2
    expected = F.interpolate(seen, (SIDE, SIDE), mode="bicubic", antialias=True).flatten(1)
    torch.testing.assert_close(_features(Pixels, images), expected, rtol=0, atol=1e-5)


def test_the_histogram_counts_combinations_of_three_channels():
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    images[1, 0] = 255
    images[1, 2, :12] = 127
    found = _features(Histogram, images).square().view(2, 4, 4, 4)
    assert found[0, 0, 0, 0] == 1 and found.sum() == pytest.approx(2)
    assert found[1, 3, 0, 0] == 0.75 and found[1, 3, 0, 1] == 0.25


@pytest.mark.parametrize("channels", [1, 5])
def test_the_histogram_of_other_numbers_of_channels_has_sixteen_bins_for_each(channels):
    images = _images(channels)
    found = _features(Histogram, images).square().view(3, channels, 16)
    for image_CHW, own_CB in zip(images, found):
        for pixels_HW, own_B in zip(image_CHW, own_CB):
            expected = torch.bincount((pixels_HW / 255 * 16).long().clamp(max=15).flatten(), minlength=16) / 48**2
            torch.testing.assert_close(own_B, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_hog_depends_on_the_orientation_of_edges_and_not_on_their_colour(channels):
    rows = torch.zeros(channels, 48, 48, dtype=torch.uint8)
    rows[:, ::8] = 200
    images = torch.stack((rows, rows.mT, rows // 2))
    found = _features(OrientedGradients, images)
    assert found.shape == (3, 900)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-3)
    assert F.cosine_similarity(found[0], found[1], dim=0) < 0.5
    if channels == 3:  # the gradient is that of the channel in which it is largest
        images[0, 1:] = 0
        torch.testing.assert_close(_features(OrientedGradients, images)[0], found[0], rtol=0, atol=1e-3)


def _input_of(folder, files):
    """Write a shard, and return the config of the image features for it. `files`: contents by file name."""
    shard = write_tar(folder / "files.tar", files.items())
    return input_config(DataConfig.model_validate({"train": [{"shards": shard, "modality": "image"}]}))


def test_image_features_read_the_channels_and_values_of_the_files(tmp_path):
    """The mean and the standard deviation are those of the training images."""
    colour = {f"{number}.png": coloured(number, "green") for number in range(4)}
    found = _input_of(tmp_path, colour)
    assert (found.channels, found.image_dtype, found.value_range, found.image_size) == (3, "uint8", None, 48)
    pixels = torch.stack([decode_image(data, 3) for data in colour.values()]) / 255
    assert found.image_mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert found.image_std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-3)

    values = [np.full((48, 48), 1000.0, np.float32), np.full((48, 48), 3000.0, np.float32)]
    found = _input_of(tmp_path, {f"{number}.npy": write_npy(each) for number, each in enumerate(values)})
    assert (found.channels, found.image_dtype, found.value_range) == (1, "float32", (1000, 3000))
    assert (found.image_mean, found.image_std) == ((0.5,), (0.5,))

    values = [np.full((48, 48), 1000.0 + number, np.float32) for number in range(20)]
    values[7][3, 4], values[9][0, 0] = 1e6, -1e6  # a single value does not determine the range
    found = _input_of(tmp_path, {f"{number}.npy": write_npy(each) for number, each in enumerate(values)})
    assert found.value_range == (1000, 1019)

    bands = {"0.npy": write_npy(np.zeros((48, 48, 5), np.uint8)), "1.npy": write_npy(np.ones((48, 48, 5), np.uint8))}
    assert _input_of(tmp_path, bands).channels == 5


@pytest.mark.slow
def test_two_models_with_different_inputs_have_the_same_baselines(transfer, tmp_path):
    """A grey model of small images does not make the baselines grey."""
    torch.manual_seed(0)
    grey = tiny_run(
        tmp_path / "grey", channels=1, image_size=16, patch_size=8, image_mean=[0.7], image_std=[0.4], vocab_size=0
    )
    colour = transfer("knn", out="colour", baselines=True)["baselines"]
    found = transfer("knn", model=grey, out="grey_result", baselines=True)["baselines"]
    for name in FEATURES:
        assert {**colour[name], "difference": 0, "verdict": 0} == {**found[name], "difference": 0, "verdict": 0}
    assert found[SCALED]["top1"] == found["colour histogram"]["top1"] == 1


@pytest.mark.slow
def test_a_baseline_without_its_library_is_left_out_with_a_warning(transfer, tmp_path, monkeypatch, capsys):
    def missing(needs):
        if "skimage" in needs:
            raise UserError("the baseline HOG needs scikit-image: pip install 'm3ae-fast[evaluate]'")

    monkeypatch.setattr(image_features, "require_libraries", missing)
    result = transfer("knn", baselines=True)
    assert [*result["baselines"]] == [UNTRAINED, SCALED, "colour histogram"]
    warning = "HOG is left out: the baseline HOG needs scikit-image: pip install 'm3ae-fast[evaluate]'"
    assert capsys.readouterr().out.count(f"warning: {warning}\n") == 1 == result["warnings"].count(warning)
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert escape(warning) in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_samples_that_the_model_cannot_read_are_left_out_of_the_baselines(transfer, tmp_path):
    """A grey model does not read arrays with three channels. The baselines are evaluated on the samples
    that the model reads."""
    grey = tiny_run(tmp_path / "grey", channels=1, image_mean=[0.7], image_std=[0.4], vocab_size=0)
    shards = {}
    for name, numbers in (("train", range(24)), ("val", range(100, 118))):
        members = [(member, data) for member, data in labelled_members(numbers) if member.endswith((".png", ".cls"))]
        members += [("x.npy", write_npy(np.zeros((32, 32, 3), np.uint8))), ("x.cls", b"1")]
        shards[name] = write_tar(tmp_path / f"{name}.tar", members)
    result = transfer("knn", *settings("data.max_bad_fraction=0.2"), model=grey, baselines=True, **shards)
    assert (result["train_samples"], result["val_samples"], result["skipped"]) == (24, 18, 2)
    assert [*result["baselines"]] == [UNTRAINED, *FEATURES]
    assert all("difference" in each for each in result["baselines"].values())


@pytest.mark.slow
def test_baselines_that_cannot_read_a_sample_of_the_model_are_left_out(transfer, run, tmp_path, monkeypatch):
    """Only the first samples are inspected, so the baselines have no value range for the image of 16 bits."""
    monkeypatch.setattr(image_features, "_INSPECTED", 1)
    deep = io.BytesIO()
    Image.fromarray(np.full((32, 32), 9000, np.uint16)).save(deep, "PNG")
    members = [(f"{number}.png", coloured(number, ("red", "blue")[number % 2])) for number in range(20)]
    members.append(("x.png", deep.getvalue()))
    files = [
        each
        for number, (name, data) in enumerate(members)
        for each in ((name, data), (f"{name[:-4]}.json", json.dumps({"tags": [number % 2]}).encode()))
    ]
    shard = write_tar(tmp_path / "a.tar", files)
    options = ["--labels", "json.tags", *settings("model.value_range=dtype")]
    result = transfer("knn", *options, baselines=True, train=shard, val=shard)
    assert (result["train_samples"], result["skipped"]) == (21, 0) and [*result["baselines"]] == [UNTRAINED]
    for name in FEATURES:
        assert f"the result is written without {name}, which cannot read 2 of the samples" in result["warnings"]


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
def test_the_pixel_baseline_classifies_colours(transfer, capsys):
    for task, options in (("knn", []), ("logistic", []), ("logistic", ["--shots", "5,9"])):
        result = transfer(task, *options, model="pixels", out=f"{task}{len(options)}")
        assert result["top1"] > 0.9 and result["model"] == "pixels"
    assert " layers" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "options"),
    [
        ("knn", "top1", ()),
        ("logistic", "top1", ()),
        ("logistic", "map", ("--labels", "json.tags")),
    ],
)
def test_baselines_have_the_results_of_their_separate_evaluations(
    transfer, run, tmp_path, task, metric, options, capsys, monkeypatch
):
    """The features of baselines are bitwise equal to those of separate evaluations. All models with the same input are
    encoded in one pass."""
    task_cases.write_data(tmp_path)
    opened, batches = [], task_features.corpus_batches
    monkeypatch.setattr(task_features, "corpus_batches", lambda *given: opened.append(given[1]) or batches(*given))
    shards = {"train": str(tmp_path / "train.tar"), "val": str(tmp_path / "val.tar")}
    options = (*options, *settings("data.max_bad_fraction=0.2"))  # some images cannot be read
    result = transfer(task, *options, baselines=True, **shards)
    assert len(opened) == 4 and [*result["baselines"]] == [UNTRAINED, *FEATURES]
    output, verdicts = capsys.readouterr().out, []
    models = {name: model for name, model in baseline_models(str(run)).items() if name in result["baselines"]}
    for name, model in models.items():
        alone = transfer(task, *options, model=model, out=name, baselines=True, **shards)
        found = result["baselines"][name]
        assert "baselines" not in alone
        measured = {key: value for key, value in found.items() if key not in ("difference", "verdict")}
        assert measured == {key: alone[key] for key in measured}
        if metric == "map" and name != "HOG":  # all scores are perfect, so that no error can be estimated
            assert found["map"] == 1.0 and not {"map_se", "difference"} & found.keys()
            assert f"\n{task}: {name}: map 1  inverse_strength " in output and name in result["warnings"][-1]
        if metric == "map":
            continue
        apart = Difference.read(found["difference"])
        assert apart.value == pytest.approx(result[metric] - alone[metric])
        assert f"{task}: {name}: {metric} {alone[metric]:.4f} ± " in output
        assert f"; {apart.words('the model', name)}\n" in output
        assert found["verdict"] == apart.words("the model", name)
        if metric == "top1":
            tables = [read_parquet(tmp_path / out / "predictions.parquet") for out in ("out", name)]
            assert apart == difference(*(np.equal(each["label"], each["prediction"]) for each in tables))
        assert (name in " ".join(result.get("warnings", []))) != apart.is_better
        verdicts.append(escape(f"{task}: {apart.words(str(run), name)}."))
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<br>".join(verdicts) in page
    for name in models:
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
        ("attentive", ("--shots", "2,5", *settings("attentive.steps=3")), ("logistic", "--shots", "2,5")),
        ("knn", ("--shots", "2,5"), ("knn", "--shots", "2,5")),
    ],
)
def test_baselines_of_trained_heads_and_of_grids_use_logistic_regression(
    transfer, run, tmp_path, task, options, alone, capsys
):
    """Only the baselines of k-NN use k-NN. Baselines have the same training samples as the task."""
    result = transfer(task, *options, baselines=True)
    output = capsys.readouterr().out
    assert [*result["baselines"]] == [UNTRAINED, *FEATURES]
    for name, model in baseline_models(str(run)).items():
        if name not in result["baselines"]:
            continue
        own = alone if name == UNTRAINED else [each for each in alone if each != "encode.pool=cls"]
        own = [each for number, each in enumerate(own) if each != "--set" or number + 1 < len(own)]
        other, found = transfer(*own, model=model, out=name), result["baselines"][name]
        assert found.get("probe", "") == ("" if alone[0] == task else "logistic regression")
        probe = "" if alone[0] == task else " (logistic regression)"
        assert f"{task}: {name}{probe}: top1 {found['top1']:.4f} ± " in output
        assert (found["top1"], found["top1_se"]) == (other["top1"], other["top1_se"])
        chosen = {"k", "standardised", "inverse_strength", "pool"}
        assert {*found} <= {"probe", "top1", "top1_se", "verdict", "difference"} | chosen
        apart = Difference.read(found["difference"])
        assert apart.value == pytest.approx(result["top1"] - found["top1"])
        assert (name in " ".join(result.get("warnings", []))) != apart.is_better


@pytest.mark.slow
def test_a_stop_during_the_baselines_keeps_the_result(transfer, run, monkeypatch, capsys):
    encode = labelled_task.encode_baselines

    def stopped(job, *given):
        job.stop.request("SIGTERM")
        return encode(job, *given)

    monkeypatch.setattr(labelled_task, "encode_baselines", stopped)
    result = transfer("linear", *SHORT, baselines=True)
    assert result["steps"] == 4 and "top1" in result and "baselines" not in result
    warning = "the result is written without baselines: stopped (SIGTERM)"
    assert f"warning: {warning}\n" in capsys.readouterr().out and warning in result["warnings"]


@pytest.mark.slow
def test_samples_that_become_unreadable_for_the_baselines_do_not_prevent_the_result(transfer, tmp_path, capsys):
    members = [(name, data[:200] if name == "00047.png" else data) for name, data in labelled_members(range(48))]
    options = settings("train.steps=1", "optim.peak_lr=1", "train.global_batch=16", "data.max_bad_fraction=0")
    result = transfer("linear", *options, train=write_tar(tmp_path / "train.tar", members), baselines=True)
    assert result["steps"] == 1 and "top1" in result and "baselines" not in result
    warning = "the result is written without random weights: 1 of 48 samples cannot be used"
    assert f"warning: {warning}" in capsys.readouterr().out
    assert any(each.startswith(warning) for each in result["warnings"])


@pytest.mark.slow
def test_baselines_of_a_grid_use_the_layer_of_its_main_accuracy(transfer, monkeypatch):
    pooled, layers = M3AE.pooled_of_layers, []

    def spied(model, batch, numbers, *more):
        layers.append(list(numbers))
        return pooled(model, batch, numbers, *more)

    monkeypatch.setattr(M3AE, "pooled_of_layers", spied)
    transfer("knn", "--layers", "1", baselines=True)
    assert layers == [[1]] * 4  # training and held-out samples, for the model and for random weights


def test_a_report_names_the_probe_of_the_baselines(tmp_path):
    """The baselines of fine-tuning use another probe, which is named in brackets. If random weights have also been
    fine-tuned, in an evaluation of their own, the report compares both results as well."""
    keys, better = [*map(str, range(50))], Difference(0.4, 0.3, 0.5, 0.01).entries()
    results = {
        "tuned": ("finetune", "m", {"verdict": "", "baselines": {UNTRAINED: {"probe": "probe", "difference": better}}}),
        "scratch": ("finetune", "random:m", {"verdict": ""}),
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


@pytest.mark.parametrize("predictions", [True, False])
def test_the_end_of_a_run_and_its_report_state_the_same_differences(tmp_path, predictions):
    """The comparison with the largest class is computed from the predictions. If they are missing, the report shows the
    verdict of result.json in its place."""
    folder, right = tmp_path / "results/knn", "the model is better than the largest class: +9.0 points"
    result = {"task": "knn", "model": "m", "top1": 1.0, "top1_se": 0.0, "verdict": right}
    result["baselines"] = {SCALED: {"top1": 0.5, "difference": Difference(0.4, 0.3, 0.5, 0.01).entries()}}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    if predictions:
        columns = {"key": [*map(str, range(50))], "label": [0, 1] * 25, "prediction": [0, 1] * 25}
        write_parquet(folder / "predictions.parquet", columns)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    words = verdict(tmp_path, {"knn": {RUN: result}})
    begin = f"verdict: by k-NN (100.0 ± 0.0 %), {RUN} is better than everything that needs no training: "
    assert words.startswith(f"{begin}{SCALED} (+40.0 ± 5.1 points)") and (LARGEST in words) == predictions
    assert f"knn: m is better than {SCALED}: +40.0 points" in page
    assert escape(right if not predictions else f"knn: m is better than {LARGEST}: +50.0 points") in page


def _predicted(folder, top1, right, baselines):
    """Write the predictions of a result on 400 samples of four classes, of which the first `right` are correct. Return
    the result."""
    labels = [number % 4 for number in range(400)]
    given = [label if number < right else (label + 1) % 4 for number, label in enumerate(labels)]
    folder.mkdir(parents=True)
    write_parquet(
        folder / "predictions.parquet", {"key": [*map(str, range(400))], "label": labels, "prediction": given}
    )
    entries = {
        name: {"top1": other, "top1_se": 0.02, "difference": Difference(top1 - other, low, high, p).entries()}
        for name, (other, low, high, p) in baselines.items()
    }
    return {"task": folder.name, "model": "m", "top1": top1, "top1_se": 0.02, "baselines": entries}


def test_the_verdict_claims_only_differences_above_two_standard_errors(tmp_path):
    """A slightly smaller difference can still be significant by the bootstrap and by McNemar's test."""
    knn = _predicted(tmp_path / "results/knn", 0.8, 320, {UNTRAINED: (0.7, 0.06, 0.14, 1e-6)})
    logistic = _predicted(
        tmp_path / "results/logistic",
        0.82,
        328,
        {UNTRAINED: (0.76, 0.03, 0.09, 1e-4), SCALED: (0.779, 0.001, 0.084, 0.04), "HOG": (0.9, -0.12, -0.04, 1e-4)},
    )
    assert Difference(0.041, 0.001, 0.084, 0.04).is_better
    words = verdict(tmp_path, {"knn": {RUN: knn}, "logistic": {RUN: logistic}})
    assert words == (
        f"verdict: by logistic regression (82.0 ± 2.0 %), {RUN} is better than {UNTRAINED} (+6.0 ± 1.5 points), "
        f"{LARGEST} (+57.0 ± 2.8 points), but not better than HOG (-8.0 ± 2.0 points), {SCALED} (+4.1 ± 2.1 points), "
        "which need no training"
    )


def test_the_verdict_says_that_a_run_is_not_better_than_baselines_that_need_no_training(tmp_path):
    """The verdict is about the probe with the highest accuracy, even if only a baseline reached it."""
    knn = _predicted(tmp_path / "results/knn", 0.3, 120, {UNTRAINED: (0.31, -0.03, 0.01, 0.6)})
    logistic = _predicted(tmp_path / "results/logistic", 0.25, 100, {SCALED: (0.5, -0.3, -0.2, 1e-9)})
    logistic["baselines"]["HOG"] = {"top1": 0.2, "top1_se": 0.02}  # it could not be compared
    (tmp_path / "results/logistic/predictions.parquet").unlink()
    words = verdict(tmp_path, {"knn": {RUN: knn}, "logistic": {RUN: logistic}})
    assert words == (
        f"verdict: by logistic regression (25.0 ± 2.0 %), {RUN} is not better than {SCALED} (-25.0 ± 2.6 points), HOG, "
        "which need no training"
    )
    start = _predicted(tmp_path / "results/knn-start", 0.3, 120, {})
    words = verdict(tmp_path, {"knn": {RUN: knn, STARTED: start}})
    assert (
        f"is not better than {UNTRAINED} (-1.0 ± 1.0 points), {STARTED} (+0.0 ± 0.0 points), {LARGEST} (+5.0 ± 3.1"
        in words
    )
    assert verdict(tmp_path, {}) == "verdict: none, because evaluating the features needs held-out samples with classes"


@pytest.mark.slow
def test_baselines_are_skipped_on_request_and_if_they_would_be_meaningless(transfer, run, tmp_path, capsys):
    cases = {
        "request": ((), {"baselines": False}),
        "text": (("--modality", "paired"), {"baselines": True}),
    }
    for out, (options, more) in cases.items():
        assert "baselines" not in transfer("knn", *options, out=out, **more), out
        assert UNTRAINED not in capsys.readouterr().out
    with pytest.raises(UserError, match="baselines: ood does not use it; leave it out"):
        Ood(model=run, train="a.tar", val="a.tar", out="out", ood={"other": "b.tar"}, baselines=False)


def test_a_warning_names_each_baseline_that_is_not_exceeded(tmp_path):
    keys, labels = [*map(str, range(100))], [0] * 60 + [1] * 40
    apart = Difference(-0.3, -0.4, -0.2, 0.01), Difference(0.2, 0.1, 0.3, 0.01)
    good, poor = ({"top1": 0.8, "difference": each.entries()} for each in apart)

    def warned(predictions, **baselines):
        write_parquet(tmp_path / "predictions.parquet", {"key": keys, "label": labels, "prediction": predictions})
        return against_largest_class(tmp_path, {"baselines": baselines}).get("warnings", [None])[0]

    assert warned(labels, a=poor) is None
    assert re.search(r"than b: top-1 accuracy 100\.0%, b 80\.0%$", warned(labels, a=poor, b=good))
    numbers = r"than the largest class, a and b: .* 60\.0%, largest class 60\.0%, a 80\.0%, b 80\.0%$"
    assert re.search(numbers, warned([0] * 100, a=good, b=good))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("attentive", (), "attentive needs a network; knn and logistic accept pixels"),
        ("linear", (), "linear needs a network; knn and logistic accept pixels"),
        ("finetune", (), "finetune needs a network; knn and logistic accept pixels"),
        (
            "knn",
            ("--modality", "paired"),
            "pixels: is computed from images, not from captions; leave out modality",
        ),
        ("knn", ("--layers", "1"), "pixels: has no layers and no poolings; leave out layers and pools"),
        ("knn", ("--pools", "cls"), "pixels: has no layers and no poolings"),
    ],
)
def test_tasks_that_the_pixel_baseline_does_not_support_are_refused(transfer, tmp_path, task, options, message):
    with pytest.raises(UserError, match=message):
        transfer(task, *options, model="pixels")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_note_says_that_a_baseline_and_not_the_folder_of_the_same_name_is_used(
    transfer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixels").mkdir()
    assert transfer("knn", model="pixels")["model"] == "pixels"
    assert "note: pixels is the baseline; the folder of this name is ./pixels\n" in capsys.readouterr().out


@pytest.mark.parametrize("samples", [1, 2])
def test_the_difference_from_a_baseline_is_undefined_for_a_single_sample(samples):
    """The bootstrap samples of one sample are all equal."""
    keys, labels_N = [f"{number}" for number in range(samples)], torch.zeros(samples, dtype=torch.int64)
    right, wrong = (Predictions.of(keys, labels_N, torch.tensor([row] * samples)) for row in ([2.0, 1.0], [1.0, 2.0]))
    entries = accuracy_entries({MODEL: [wrong], UNTRAINED: [right]})["baselines"][UNTRAINED]
    assert entries["top1"] == 1 and ("difference" in entries) == (samples > 1)
    # as if one sample could be read in only one of the two evaluations
    other = replace(right, keys=[*keys[1:], "another"])
    assert "difference" not in accuracy_entries({MODEL: [wrong], UNTRAINED: [other]})["baselines"][UNTRAINED]
