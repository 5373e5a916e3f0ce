"""The attacks of the robustness task work as documented, and the task counts the correct predictions properly."""

import argparse
from dataclasses import replace

import foolbox
import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import nn

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import RobustnessConfig
from m3ae_fast.evaluation import robustness
from m3ae_fast.evaluation.robustness import _start, pgd
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.images.decoding import decode_image
from tests.evaluation.conftest import finetune_settings
from tests.helpers.labelled import NAMES, coloured

pytestmark = pytest.mark.slow

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


def test_the_robustness_accuracies_equal_those_of_the_classifier(transfer, classifier, tmp_path, monkeypatch, capsys):
    drawn = []
    draw = robustness.draw_attack
    monkeypatch.setattr(robustness, "draw_attack", lambda *what: drawn.append(what) or draw(*what))
    options = ["--set", "robustness.epsilons=[1e-6,64]"]
    options += ["--set", "robustness.samples=9"]  # every second sample
    result = transfer("robustness", *options, model=classifier, train=None)
    assert result["task"] == "robustness" and list(result["pgd"]) == ["1e-06/255", "64/255"]
    assert result["pgd"]["1e-06/255"] == result["top1"]  # the attack is too weak to change a prediction
    assert result["top1"] > 0.9 > result["pgd"]["64/255"]
    assert result["val_samples"] == 9 and result["top1_se"] < 0.1
    output = capsys.readouterr().out
    assert "9 images in 3 passes: clean images and 2 attacks of 10 steps" in output
    assert f"equivalent to classifying {9 * (1 + 2 * 31):,} images" in output
    assert "clean (1 of 3, about 0:" in output and "pgd 64/255 (3 of 3): top1" in output
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for name, top1 in (("clean", result["top1"]), ("pgd 64/255", result["pgd"]["64/255"])):
        rows = table[table.condition == name]
        assert [key[-5:] for key in rows.key] == [f"{number:05d}" for number in range(100, 118, 2)]
        assert (rows.label == rows.prediction).mean() == pytest.approx(top1)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["attack.png"]
    assert drawn == [(tmp_path / "out/attack.png", [1e-6, 64], list(result["pgd"].values()), result["top1"])]


def test_a_fine_tuned_classifier_can_be_attacked(transfer, tmp_path):
    quick = {"global_batch": 16, "epochs": 4, "warmup_epochs": 0, "peak_lr": 3e-3, "mixup": 0, "cutmix": 0}
    tuned = transfer("finetune", *finetune_settings(**quick, rand_augment=None), out="tuned")
    light = ["--set", "robustness.epsilons=[64]", "--set", "encode.batch=5"]
    result = transfer("robustness", *light, model=tmp_path / "tuned", train=None, out="attacked")
    assert result["top1"] == pytest.approx(tuned["top1"]) and result["pgd"]["64/255"] < result["top1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "robustness.steps=0"], "greater than 0"),
        (["--set", "encode.pool=cls"], "robustness does not use this setting; of encode, it uses only batch"),
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
    config = RobustnessConfig(epsilons=[2, 0.5], steps=3, step_size=0.4)
    whole = argparse.Namespace(robustness=config, run=argparse.Namespace(seed=5))
    job = argparse.Namespace(model=model, config=whole, ranks=argparse.Namespace(device=torch.device("cpu")))
    passes = robustness._passes(job, config)
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
    # in a native batch, `images` contains the patches of all samples
    native = argparse.Namespace(keys=["a/1", "a/2"], images=torch.zeros(8, 3, 4, 4), grids=[(1, 3), (5, 1)])
    assert _start(native, 3).shape == (8, 3, 4, 4)
    assert -1 <= values.min() < -0.98 and 0.98 < values.max() <= 1 and abs(values.mean()) < 0.05
