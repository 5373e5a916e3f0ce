"""The modes in which each program runs the encoder: training or evaluation, autocast, gradients."""

import re

import numpy as np
import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli import embed as features
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config.evaluation import evaluation_config
from m3ae_fast.evaluation.tasks import TASKS
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.modules import BatchNorm
from m3ae_fast.model.encoder import MultimodalEncoder
from tests.evaluation.conftest import settings
from tests.helpers.labelled import labelled_tar

pytestmark = pytest.mark.slow

EVALUATES, ATTACKS, TRAINS = (False, False), (False, True), (True, True)  # (training, with gradients)
LINEAR = settings("train.steps=2", "train.global_batch=8", "optim.peak_lr=0.1")
TUNE = settings("train.steps=2", "train.global_batch=8", "optim.warmup_epochs=0", "finetune.drop_path=0")
LIGHT = settings("robustness.epsilons=[1]", "robustness.steps=2")

# The other tasks are left out: robustness has a test of its own, segment requires masks, and compare encodes images in
# the same way as knn and logistic.
ENCODING = [task for task in TASKS if task not in ("robustness", "segment", "compare")]


@pytest.fixture
def encoder_modes(monkeypatch):
    """Return a list of (training, with gradients, autocast), with an entry for each pass through the encoder."""
    found, real = [], MultimodalEncoder._input

    def record_modes(self, batch):
        modes = {module.training for module in self.modules()}
        assert len(modes) == 1
        found.append((modes.pop(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return real(self, batch)

    monkeypatch.setattr(MultimodalEncoder, "_input", record_modes)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_task_requires_an_output_folder(task):
    with pytest.raises(UserError, match="--out"):
        main([task, "model", "--train", "a.tar", "--val", "b.tar"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ENCODING)
def test_tasks_encode_in_the_configured_precision_without_gradients_unless_they_train_the_encoder(
    transfer, shards, encoder_modes, task, precision
):
    encode = settings(f"encode.precision={precision}") if task != "finetune" else []
    options = {
        "ood": ["--ood", shards[1]],
        "linear": LINEAR,
        "attentive": settings("attentive.steps=2"),
        "finetune": [*TUNE, *settings(f"train.precision={precision}", "finetune.rand_augment=null")],
    }
    transfer(task, *options.get(task, []), *encode)
    expected = {TRAINS, EVALUATES} if task == "finetune" else {EVALUATES}
    assert {modes[:2] for modes in encoder_modes} == expected
    assert {modes[2] for modes in encoder_modes} == {precision == "bf16"}


def test_robustness_evaluates_in_float32_and_computes_gradients_only_in_attacks(transfer, tmp_path, encoder_modes):
    transfer("linear", *LINEAR, out="classifier")
    trained = Classifier.from_pretrained(tmp_path / "classifier")
    encoder_modes.clear()
    transfer("robustness", *LIGHT, model=tmp_path / "classifier", train=None, out="attacked")
    assert {modes[:2] for modes in encoder_modes} == {EVALUATES, ATTACKS} and not any(
        modes[2] for modes in encoder_modes
    )
    assert sum(modes[1] for modes in encoder_modes) == 2  # the steps of the attack
    after = Classifier.from_pretrained(tmp_path / "classifier")
    assert torch.equal(trained.head.norm.mean, after.head.norm.mean)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_computed_in_evaluation_mode_and_the_configured_precision(
    run, shards, tmp_path, encoder_modes, precision
):
    out = tmp_path / "a.npz"
    assert features.main([str(run), shards[1], "--out", str(out), *settings(f"encode.precision={precision}")]) == 0
    assert {*encoder_modes} == {(*EVALUATES, precision == "bf16")} and len(np.load(out)["features"]) == 18


def test_batch_normalisation_of_a_probe_uses_batch_statistics_in_training_and_running_ones_in_evaluation(
    transfer, monkeypatch
):
    modes, real = [], BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x: modes.append((self.training, len(x))) or real(self, x))
    transfer("linear", *LINEAR)
    assert modes == [(True, 8), (True, 8), (False, 18)]


def test_the_prediction_for_a_sample_does_not_depend_on_the_other_samples(transfer, tmp_path):
    """An evaluation uses neither batch statistics nor stochastic depth."""
    transfer("logistic", out="classifier")
    shard = labelled_tar(tmp_path / "a.tar", range(6))
    light = settings("robustness.epsilons=[]", "robustness.samples=99")
    whole, single = (
        transfer("robustness", *light, *settings(f"encode.batch={batch}"), model=tmp_path / "classifier",
                 train=None, val=shard, out=f"b{batch}")
        for batch in (6, 1)
    )  # fmt: skip
    assert whole["top1"] == single["top1"] and whole["val_samples"] == single["val_samples"] == 6


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_every_setting_of_a_task(task, capsys):
    with pytest.raises(SystemExit):
        main([task, "--help", "all"])
    shown = capsys.readouterr().out
    for section in TASKS[task].uses.sections:
        for key in TASKS[task].uses.keys(section):
            assert f"  {section}.{key}\n" in shown
    text = " ".join(shown.split())
    if task in ("knn", "ood", "compare"):
        assert "Number of neighbours that vote. null: the tasks" in text
    if task == "finetune":
        assert "Learning rate after the warm-up, for" in text and "Default: 0.001, not multiplied by the batch" in text
        assert "Default: derived from the number of training samples; allowed: integer > 0" in text
        assert "finetune.hours" not in text and "optim.name" not in text
    if task == "robustness":
        assert "of 1/255. Default: [0.5, 1, 2, 4]; allowed: list: number > 0, ≤ 255." in text


def _config(task, override):
    given = {"data": {"train": [{"shards": "a.tar"}]}}
    return evaluation_config(given, [override], task, TASKS[task].uses)


@pytest.mark.parametrize(
    ("task", "override"),
    [
        ("knn", "data.flip=false"),
        ("logistic", "data.show_channels=[0,1,2]"),
        ("segment", "data.crop_scale=[0.5,1]"),
        ("ood", "data.repeats=2"),
        ("robustness", "data.lanes=8"),
        ("linear", "data.image_tokens=workers"),
    ],
)
def test_settings_of_the_data_that_a_task_ignores_are_refused(task, override):
    name = override.partition("=")[0]
    start = f"override {name}: {task} does not use this setting; of data, it uses only train, val, tokenizer, "
    with pytest.raises(UserError, match=re.escape(start)):
        _config(task, override)


def test_settings_of_the_data_that_a_task_uses_are_accepted():
    assert not _config("attentive", "data.flip=false").data.flip
    assert _config("linear", "data.repeats=2").data.repeats == 2
    assert _config("knn", "data.show_channels=[2,1,0]").data.show_channels == (2, 1, 0)
    assert _config("robustness", "data.workers=3").data.workers == 3
    with pytest.raises(UserError, match=r"data\.flips"):
        _config("knn", "data.flips=false")
