"""Attacks and corruptions are as documented, and the task counts correctly."""

import argparse
import colorsys
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import foolbox
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pyarrow import parquet
from torch import nn

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import CommonCorruption, ExtraCorruption, RobustnessConfig
from m3ae_fast.evaluation import robustness
from m3ae_fast.evaluation.classifier import Classifier, ClassifierConfig
from m3ae_fast.evaluation.corruptions import KINDS, SEVERITIES, Corruption
from m3ae_fast.evaluation.corruptions.blur import trail
from m3ae_fast.evaluation.corruptions.digital import saturate
from m3ae_fast.evaluation.corruptions.published import published_sets
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.robustness import _result, _start, corruption_errors, pgd
from m3ae_fast.images.decoding import decode_image
from tests.evaluation.conftest import settings
from tests.helpers.labelled import NAMES, coloured, labelled_tar

pytestmark = pytest.mark.slow

CORRUPTED = Path(__file__).with_name("corruptions.png")
SIZES = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=4, image_size=32, patch_size=8, text_length=16, vocab_size=2048
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return a folder with an untrained encoder and a linear head that classifies colours, fitted by least squares."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    config = ClassifierConfig(model=SIZES, head="linear", pool="mean", modality="image", classes=[0, 1, 2])
    model = Classifier(config)
    model.backbone.reset_parameters()
    images = [decode_image(coloured(number, NAMES[number % 3]), 3) for number in range(48)]
    features_SD = model.backbone.encode(images, pool="mean", precision="fp32")
    model.head.norm.var.copy_(features_SD.var(0, correction=0))
    model.head.norm.mean.copy_(features_SD.mean(0))
    wanted_SK = torch.eye(3)[torch.arange(48) % 3]
    solution = torch.linalg.lstsq(model.eval().head.norm(features_SD), wanted_SK - 1 / 3).solution
    model.head.linear.weight.data = solution.T.contiguous()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("epsilon", [0.01, 0.1])
def test_pgd_equals_that_of_foolbox(epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 4
    attack = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=7, random_start=False)
    criterion = foolbox.criteria.Misclassification(labels)
    theirs = attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), images, criterion, epsilon=epsilon)
    ours = pgd(model, images, labels, torch.zeros_like(images), epsilon, 7, epsilon / 4)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, images)


def test_an_attack_stays_within_its_bounds_and_raises_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 4
    start = torch.rand_like(images) * 2 - 1
    attacked = pgd(model, images, labels, start, 0.05, 10, 0.0125)
    assert (attacked - images).abs().max() <= 0.05 + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    before, after = (nn.functional.cross_entropy(model(x), labels) for x in (images, attacked))
    assert after > before + 0.05


def test_the_config_lists_every_corruption():
    assert [*get_args(CommonCorruption), *get_args(ExtraCorruption)] == list(KINDS)
    assert len(RobustnessConfig().corruptions) == 15


def _image(size=224):
    """Return an image of coloured shapes and stripes on a bright background, uint8 [3, H, W]."""
    image = Image.new("RGB", (224, 224), (235, 240, 225))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 150, 160), fill=(200, 60, 40))
    draw.rectangle((120, 90, 200, 190), fill=(40, 90, 180))
    for x in range(20, 210, 30):
        draw.line((x, 20, x + 25, 205), fill=(30, 30, 30), width=6)
    return torch.from_numpy(np.array(image.resize((size, size)))).permute(2, 0, 1).contiguous()


DRAWN = {"glass_blur", "motion_blur", "snow", "frost", "fog", "elastic", "spatter"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_depends_only_on_its_seed_and_increases_with_its_severity(kind):
    image = _image()
    found = [Corruption(kind, severity)(image, 7) for severity in SEVERITIES]
    assert all(each.shape == image.shape and each.dtype == torch.uint8 for each in found)
    assert torch.equal(found[2], Corruption(kind, 3)(image, 7))
    drawn = kind.endswith("noise") or kind in DRAWN
    assert drawn != torch.equal(found[2], Corruption(kind, 3)(image, 8))
    distances = [(each.double() - image.double()).square().mean().item() for each in found]
    # In both kinds, severities 1 and 2 differ from 3 to 5: less or more colour, shifts of the image or ripples.
    parts = [distances[:2], distances[2:]] if kind in ("saturate", "elastic") else [distances]
    assert all(part == sorted(part) and part[0] > 1 for part in parts)


@pytest.mark.parametrize(("kind", "severity"), [("defocus_blur", 3), ("motion_blur", 4), ("gaussian_blur", 2)])
def test_the_width_of_a_blur_scales_with_the_size_of_the_image(kind, severity):
    """A blurred small image is similar to a large image that is blurred and then reduced."""
    large = torch.zeros(3, 224, 224, dtype=torch.uint8)
    large[:, 80:144, 80:144] = 255
    shrunk, clean = (
        nn.functional.avg_pool2d(image.float()[None], 4)[0] for image in (Corruption(kind, severity)(large, 0), large)
    )
    small = Corruption(kind, severity)(large[:, ::4, ::4].contiguous(), 0).float()
    assert (small - shrunk).abs().mean() < 0.15 * (shrunk - clean).abs().mean() + 1


def test_the_kernel_of_a_motion_blur_is_half_a_gaussian_along_its_angle():
    point = np.zeros((41, 41, 1))
    point[20, 20] = 1
    weights = np.exp(-(np.arange(21) ** 2) / 18)
    level = trail(point, 10, 3, 0)[20, ::-1, 0][20:]
    np.testing.assert_allclose(level, weights / weights.sum())
    down = trail(point, 10, 3, -90)[20:, 20, 0]
    np.testing.assert_allclose(down, weights / weights.sum())


def sheet():
    """Return images of every corruption at every severity, with a row for each kind: images of 48 pixels, averaged over
    4 x 4. The file CORRUPTED contains the expected result."""
    rows = [torch.cat([Corruption(kind, severity)(_image(48), 7) for severity in SEVERITIES], 2) for kind in KINDS]
    means = nn.functional.avg_pool2d(torch.cat(rows, 1)[None].float(), 4)[0]
    return Image.fromarray(means.round().byte().permute(1, 2, 0).numpy())


def test_corruptions_equal_those_of_earlier_versions():
    """If they changed, accuracies could not be compared with those of earlier versions."""
    before, now = np.array(Image.open(CORRUPTED), float), np.array(sheet(), float)
    apart = np.abs(now - before).reshape(len(KINDS), 12, len(SEVERITIES), 12, 3).max((1, 3, 4))
    assert {kind: own.tolist() for kind, own in zip(KINDS, apart) if own.max() > 3} == {}


def test_images_of_a_few_pixels_can_be_corrupted():
    image = torch.randint(256, (3, 2, 3), dtype=torch.uint8)
    assert {Corruption(kind, 5)(image, 0).shape for kind in KINDS} == {image.shape}


def test_the_mean_corruption_error_is_an_unweighted_mean():
    found = corruption_errors({"fog": [0.5, 0.7], "frost": [0.9, 0.9]}, clean=0.95)
    assert found["corruption_error"] == pytest.approx({"fog": 0.4, "frost": 0.1})
    assert found["mean_corruption_error"] == pytest.approx(0.25)
    assert found["relative_mean_corruption_error"] == pytest.approx(0.2)


def test_accuracies_are_in_the_order_of_the_requested_severities():
    def right(count):
        return Predictions([""] * 10, torch.zeros(10), (torch.arange(10) >= count)[:, None].long(), torch.ones(10))

    found = {"clean": right(9), "fog 5": right(2), "fog 1": right(8), "fog 3": right(4)}
    config = RobustnessConfig(epsilons=[], corruptions=["fog"], severities=[5, 1, 3])
    kinds = {"fog": [5, 1, 3]}
    assert _result(config, kinds, found)["corruptions"] == {"fog": [0.2, 0.8, 0.4]}
    del found["fog 3"]
    assert "corruption_error" not in _result(config, kinds, found)


def test_published_corrupted_datasets_are_found_by_corruption_and_severity(tmp_path):
    for name in ("noise/gaussian_noise/1", "noise/gaussian_noise/2", "frost/3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "val-0.tar").touch()
    found = published_sets(tmp_path)
    assert {kind: list(sets) for kind, sets in found.items()} == {"frost": [3], "gaussian_noise": [1, 2]}
    assert found["frost"][3] == [str(tmp_path / "frost/3/val-0.tar")]
    (tmp_path / "frost/4").mkdir()
    with pytest.raises(UserError, match="frost/4 has no shards; make them from a folder of images"):
        published_sets(tmp_path)
    for folder, message in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path / "frost/3", "has no shards of the form CORRUPTION/SEV"),
    ):
        with pytest.raises(UserError, match=message):
            published_sets(folder)
    (tmp_path / "gaussian_noise/2").mkdir(parents=True)
    (tmp_path / "gaussian_noise/2/val-0.tar").touch()
    (tmp_path / "frost/4").rmdir()
    with pytest.raises(UserError, match="has two folders for gaussian_noise at severity 2"):
        published_sets(tmp_path)


def test_published_corrupted_images_replace_generated_ones(transfer, classifier, shards, tmp_path):
    """Each severity has its own images: in this test the clean images, and images with the labels of other colours."""
    for severity, labels in ((1, None), (3, {number: (number + 1) % 3 for number in range(100, 118)})):
        folder = tmp_path / f"c/frost/{severity}"
        folder.mkdir(parents=True)
        labelled_tar(folder / "val.tar", range(100, 118), labels)
    options = ["--corrupted", str(tmp_path / "c"), *settings("robustness.epsilons=[]")]
    result = transfer("robustness", *options, model=classifier, train=None)
    assert result["corruptions"] == {"frost": [result["top1"], 0.0]} and result["top1"] > 0.9
    assert result["corruption_error"]["frost"] == 1 - result["top1"] / 2 and result["procedural"] == []
    assert (tmp_path / "out/corruptions.png").exists()
    with pytest.raises(UserError, match="--corrupted provides the corruptions; leave"):
        transfer(
            "robustness", *options, *settings('robustness.corruptions=["fog"]'), model=classifier, train=None, out="b"
        )


def test_brightness_and_saturation_are_changed_in_hsv():
    image = torch.randint(256, (3, 5, 5), dtype=torch.uint8)
    for kind, change in (
        ("brightness", lambda h, s, v: (h, s, min(v + 0.3, 1))),
        ("saturate", lambda h, s, v: (h, min(s * 2, 1), v)),
    ):
        found = Corruption(kind, 3)(image, 0).permute(1, 2, 0).reshape(-1, 3)
        for pixel, ours in zip(image.permute(1, 2, 0).reshape(-1, 3) / 255, found):
            expected = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel.tolist())))
            assert ours.tolist() == pytest.approx([255 * x for x in expected], abs=1.01)
    grey = np.full((1, 1, 3), 0.5)
    assert saturate(grey, (5, 0.1), None)[0, 0].tolist() == pytest.approx(colorsys.hsv_to_rgb(0, 0.1, 0.5))


def test_noise_has_the_documented_magnitude():
    grey = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    noise = (Corruption("gaussian_noise", 1)(grey, 0).double() - 127.5) / 255
    assert noise.std().item() == pytest.approx(0.08, rel=0.02)
    noise = (Corruption("speckle_noise", 1)(grey, 0).double() - 127.5) / 255
    assert noise.std().item() == pytest.approx(0.15 * 0.502, rel=0.02)
    shot = Corruption("shot_noise", 1)(grey, 0).double() / 255
    assert shot.std().item() == pytest.approx((0.502 / 60) ** 0.5, rel=0.02)
    impulses = Corruption("impulse_noise", 5)(grey, 0)
    assert (impulses == 255).double().mean().item() == pytest.approx(0.27 / 2, rel=0.05)
    assert (impulses == 0).double().mean().item() == pytest.approx(0.27 / 2, rel=0.05)


def test_blurs_preserve_a_uniform_image_and_spread_a_point():
    even = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    point = torch.zeros(3, 224, 224, dtype=torch.uint8)
    point[:, 112, 112] = 255
    for kind in ("gaussian_blur", "defocus_blur", "zoom_blur"):
        assert (Corruption(kind, 3)(even, 0).int() - 100).abs().max() <= 1
    disk = Corruption("defocus_blur", 1)(point, 0)[0] > 0
    rows, columns = np.mgrid[-112:112, -112:112]
    assert (disk.numpy() == (rows**2 + columns**2 <= 9)).all()


def test_the_robustness_accuracies_equal_those_of_the_classifier(transfer, classifier, tmp_path, monkeypatch, capsys):
    drawn = {}
    for name in ("draw_attack", "draw_sheet"):
        draw = getattr(robustness, name)

        def keep(path, *what, draw=draw, name=name):
            drawn[name] = what
            draw(path, *what)

        monkeypatch.setattr(robustness, name, keep)
    predict = robustness._predictions

    def with_mistakes(job, each, title, whole):  # one more mistake at each severity
        found = predict(job, each, title, whole)
        mistakes, best = each.corruption.severity if each.corruption else 0, found.best_NK.clone()
        best[:mistakes, 0] = (found.labels_N[:mistakes] + 1) % len(job.model.config.classes)
        return replace(found, best_NK=best)

    monkeypatch.setattr(robustness, "_predictions", with_mistakes)
    options = ["--set", "robustness.epsilons=[1e-6,64]", "--set", 'robustness.corruptions=["jpeg","contrast"]']
    options += ["--set", "robustness.samples=9"]  # every second sample
    result = transfer("robustness", *options, model=classifier, train=None)
    assert result["task"] == "robustness" and list(result["pgd"]) == ["1e-06/255", "64/255"]
    assert result["pgd"]["1e-06/255"] == result["top1"]  # the attack is too weak to change a prediction
    assert result["top1"] > 0.9 > result["pgd"]["64/255"]
    assert [len(found) for found in result["corruptions"].values()] == [5, 5]
    every = np.mean(list(result["corruptions"].values()))
    assert result["mean_corruption_error"] == pytest.approx(1 - every)
    assert result["val_samples"] == 9 and result["top1_se"] < 0.1
    output = capsys.readouterr().out
    assert "9 images in 13 passes: clean images, 2 attacks of 10 steps, 2 corruptions at 5 severities" in output
    assert f"equivalent to classifying {9 * (1 + 2 * 31 + 10):,} images" in output
    assert "clean (1 of 13, about 0:" in output and "contrast 5 (13 of 13): top1" in output
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for name, top1 in (("clean", result["top1"]), ("jpeg 2", result["corruptions"]["jpeg"][1])):
        rows = table[table.condition == name]
        assert [key[-5:] for key in rows.key] == [f"{number:05d}" for number in range(100, 118, 2)]
        assert (rows.label == rows.prediction).mean() == pytest.approx(top1)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"attack.png", "corruptions.png"}
    assert drawn["draw_attack"] == ([1e-6, 64], list(result["pgd"].values()), result["top1"])
    rows, titles = drawn["draw_sheet"]
    assert titles == ("without corruption", *(f"severity {number}" for number in range(1, 6)))
    for (kind, found), (clean, *corrupted) in zip(result["corruptions"].items(), rows, strict=True):
        assert clean.text == kind
        for severity, (cell, top1) in enumerate(zip(corrupted, found, strict=True), 1):
            assert cell.text == f"accuracy {top1:.1%}"
            assert torch.equal(cell.image, Corruption(kind, severity)(clean.image, result["config"]["run"]["seed"]))


def test_a_fine_tuned_classifier_can_be_attacked(transfer, tmp_path):
    quick = {"global_batch": 16, "epochs": 4, "warmup_epochs": 0, "peak_lr": 3e-3, "mixup": 0, "cutmix": 0}
    options = [o for k, v in quick.items() for o in ("--set", f"finetune.{k}={json.dumps(v)}")]
    tuned = transfer("finetune", "--set", "finetune.rand_augment=null", *options, out="tuned")
    light = ["--set", "robustness.epsilons=[64]", "--set", "robustness.corruptions=[]", "--set", "robustness.batch=5"]
    result = transfer("robustness", *light, model=tmp_path / "tuned", train=None, out="attacked")
    assert result["top1"] == pytest.approx(tuned["top1"]) and result["pgd"]["64/255"] < result["top1"]
    assert "mean_corruption_error" not in result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "robustness.severities=[6]"], "less than or equal to 5"),
        (["--set", 'robustness.corruptions=["rain"]'], "robustness.corruptions"),
        (["--set", "robustness.severities=[]"], "to evaluate no corruptions, set corruptions to []"),
        (["--set", "robustness.epsilons=[1,2,1.0]"], "epsilons contains 1 twice"),
        (["--labels", "json.name"], "no training sample has the label"),
        (["--labels", "text.x"], "must be cls"),
    ],
)
def test_user_errors_are_reported_in_one_line(classifier, shards, tmp_path, capsys, options, message):
    command = ["robustness", str(classifier), "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main([*command, *options])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_robustness_refuses_a_run_because_it_is_not_a_classifier(run, shards, tmp_path, capsys):
    command = ["robustness", str(run), "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main(command)) == 2
    assert "not a classifier" in capsys.readouterr().err


def test_the_task_attacks_with_the_bounds_and_steps_of_its_settings(classifier, monkeypatch):
    """The result is the logits of the attacked images."""
    model, given = Classifier.from_pretrained(classifier).eval(), []

    def attack(logits_of, *arguments):
        given.append(arguments)
        return pgd(logits_of, *arguments)

    monkeypatch.setattr(robustness, "pgd", attack)
    config = RobustnessConfig(epsilons=[2, 0.5], steps=3, step_size=0.4, corruptions=[])
    whole = argparse.Namespace(robustness=config, run=argparse.Namespace(seed=5))
    job = argparse.Namespace(model=model, config=whole, ranks=argparse.Namespace(device=torch.device("cpu")))
    passes = robustness._passes(job, config, None, {})
    levels = [torch.from_numpy(np.random.RandomState(i).randint(0, 256, (3, 32, 32), np.uint8)) for i in range(3)]
    visible = torch.zeros(16, dtype=torch.bool)
    samples = [Sample(f"a.tar/{i}", image, visible, label=i) for i, image in enumerate(levels)]
    batch = pack(samples, model.backbone.geometry)
    mean, std = (torch.tensor(values)[:, None, None] for values in (SIZES.image_mean, SIZES.image_std))
    for number, epsilon in enumerate(config.epsilons):
        found = passes[f"pgd {epsilon:g}/255"].classify(batch)
        images, labels, start, bound, steps, step_size = given[number]
        torch.testing.assert_close(images, torch.stack(levels) / 255)
        assert labels.tolist() == [0, 1, 2] and torch.equal(start, _start(batch, 5)) and steps == 3
        assert (bound, step_size) == (pytest.approx(epsilon / 255), pytest.approx(0.4 * epsilon / 255))
        attacked = pgd(lambda x: model(replace(batch, images=(x - mean) / std)), *given[number])
        assert 0.9 * bound < (attacked - images).abs().max() <= bound + 1e-6
        torch.testing.assert_close(found, model(replace(batch, images=(attacked - mean) / std)))


def test_the_random_start_of_an_attack_depends_only_on_seed_and_sample():
    def starts(keys, seed=3):
        images, grids = torch.zeros(len(keys), 3, 8, 8), [(2, 2)] * len(keys)
        return dict(zip(keys, _start(argparse.Namespace(keys=keys, images=images, grids=grids), seed)))

    whole = starts(["a/1", "a/2", "a/3", "b/1"])
    for keys in (["b/1"], ["a/3", "a/1"]):
        assert all(torch.equal(start, whole[key]) for key, start in starts(keys).items())
    values = torch.stack([*whole.values(), *starts(["a/1"], seed=4).values()])
    assert len({start.numpy().tobytes() for start in values}) == 5
    # native images are the patches of all samples
    native = argparse.Namespace(keys=["a/1", "a/2"], images=torch.zeros(8, 3, 4, 4), grids=[(1, 3), (5, 1)])
    assert _start(native, 3).shape == (8, 3, 4, 4)
    assert -1 <= values.min() < -0.98 and 0.98 < values.max() <= 1 and abs(values.mean()) < 0.05
