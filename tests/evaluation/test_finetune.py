"""Fine-tuning decreases the loss, resumes with bitwise identical results, and writes a classifier."""

import json
import os
import random
import signal
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import transforms_imagenet_train

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import FINETUNE, FineTuneConfig
from m3ae_fast.data.rank_share import MicroBatches, Share
from m3ae_fast.evaluation import finetune, linear
from m3ae_fast.evaluation.augment import Mixing, RandAugment
from m3ae_fast.evaluation.finetune import TrainableClassifier
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.images.crops import centre_crop
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.encoder import MultimodalEncoder
from tests.evaluation.conftest import finetune_settings
from tests.helpers.labelled import labelled_members, labelled_tar
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

QUICK = {
    "global_batch": 16, "micro_batch": 8, "epochs": 4, "warmup_epochs": 0, "peak_lr": 3e-3, "mixup": 0, "cutmix": 0,
    "rand_augment": None, "precision": "fp32", "log_every": 1,
}  # fmt: skip


def settings(**changed):
    return finetune_settings(**(QUICK | changed))


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("modality", "changed"),
    [
        ("image", {"pool": "mean"}),
        ("text", {}),
        ("paired", {"ema": 0.5, "rand_augment": "rand-m5-n1"}),
        ("image", {"mixup": 0.8, "cutmix": 1.0, "epochs": 8}),
    ],
)
def test_fine_tuning_learns_and_its_classifier_can_be_loaded(transfer, tmp_path, modality, changed):
    result = transfer("finetune", "--modality", modality, *settings(**changed))
    assert result["task"] == "finetune" and result["top1"] >= 0.7 and "top5" not in result
    counts = [result[name] for name in ("classes", "train_samples", "val_samples", "skipped", "steps")]
    assert counts == [3, 48, 18, 0, 3 * changed.get("epochs", 4)]
    assert read_metrics(tmp_path / "out")[0]["lr"] == pytest.approx(3e-3), (
        "the learning rate is not multiplied by the batch size"
    )
    model = Classifier.from_pretrained(tmp_path / "out").eval()
    assert model.config.classes == [0, 1, 2] and model.config.modality == modality
    assert (model.backbone.tokenizer is None) == (modality == "image")
    samples, members = [], dict(labelled_members(range(100, 118)))
    for number in range(100, 118):
        image = centre_crop(decode_image(members[f"{number:05d}.png"], 3), 32) if modality != "text" else None
        words = members[f"{number:05d}.txt"].decode() if modality != "image" else None
        samples.append(unmasked_sample(number, image, words, model.config.model, model.backbone.tokenizer))
    with torch.no_grad():
        found = model(pack(samples, model.backbone.geometry)).argmax(1)
    assert (found == torch.arange(100, 118) % 3).double().mean().item() == pytest.approx(result["top1"])


def test_resumed_fine_tuning_equals_an_uninterrupted_run(transfer, tmp_path, capsys):
    options = settings(mixup=0.8, cutmix=1.0, ema=0.9, drop_path=0.2, rand_augment="rand-m9-mstd0.5-inc1", save_every=3)
    whole = transfer("finetune", *options, out="whole")
    transfer("finetune", *options, out="parts")
    (tmp_path / "parts/result.json").unlink()
    transfer("finetune", *options, "--resume", str(tmp_path / "parts/checkpoints/step-00000009"), out="parts")
    parts = json.loads((tmp_path / "parts/result.json").read_text())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 12
    assert parts["top1"] == whole["top1"]
    one, other = (Classifier.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stop_request_during_an_evaluation_saves_the_state(transfer, run, shards, tmp_path, monkeypatch):
    options = settings(epochs=2, eval_every=3)
    whole = transfer("finetune", *options, out="whole")
    of, calls = finetune.Predictions.of, []

    def signalled(*given, **options):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return of(*given, **options)

    monkeypatch.setattr(finetune.Predictions, "of", signalled)
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "parts")]
    assert main([*command, "--set", "data.workers=0", *options]) == 0
    assert calls == [1] and not (tmp_path / "parts/result.json").exists()
    assert [path.name for path in checkpoint.saved_steps(tmp_path / "parts")] == ["step-00000003"]
    monkeypatch.undo()
    assert transfer("finetune", *options, "--resume", "auto", out="parts")["top1"] == whole["top1"]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    evaluated = [
        [line["step"] for line in read_metrics(tmp_path / run) if "val_top1" in line] for run in ("whole", "parts")
    ]
    assert evaluated[0] == evaluated[1], "the resumed run repeats the interrupted evaluation"


def test_fine_tuning_does_not_depend_on_ranks_or_zero_stage(transfer, run, shards, tmp_path):
    """Random draws do not depend on the rank or the micro-batch."""
    drawn = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "rand_augment": "rand-m9-mstd0.5-inc1"}
    options = settings(epochs=1, label_smoothing=0.1, micro_batch=4, ema=0.7, **drawn)
    transfer("finetune", *options, "--set", "train.micro_batch=16", out="one")
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "two")]
    command += ["--set", "data.workers=0", *options]
    command += ["--set", 'deepspeed={"zero_optimization": {"stage": 3}}']
    code, out = run_ranks("m3ae_fast.cli.evaluate", command, 2, tmp_path / "log")
    assert code == 0, out[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["top1"] == results[1]["top1"]
    averages = [Classifier.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, weight in averages[0].items():
        other = averages[1][name]
        if name.endswith("qkv.bias"):
            # softmax is invariant to the keys' bias: its gradient is rounding error, which Adam amplifies
            weight, other = (torch.cat(bias.chunk(3)[::2]) for bias in (weight, other))
        np.testing.assert_allclose(other, weight, rtol=2e-3, atol=1e-4)
    last = checkpoint.open_state(checkpoint.saved_steps(tmp_path / "one")[-1])
    assert torch.equal(averages[0]["head.linear.weight"], last.whole("ema/head.linear.weight"))
    assert not torch.allclose(averages[0]["head.linear.weight"], last.whole("model/head.linear.weight"), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "finetune.mixupp=1"], "did you mean finetune.mixup?"),
        (
            ["--set", "finetune.peak_lr=1"],
            "override finetune.peak_lr: finetune does not use this setting; did you mean optim.peak_lr?",
        ),
        (
            ["--set", "linear.epochs=3"],
            "override linear.epochs: finetune does not use this setting; did you mean train.epochs?",
        ),
        (
            ["--set", "encode.batch=3"],
            "encode.batch: finetune does not use this setting; it uses only the sections finetune, optim, train, "
            "deepspeed, run, data",
        ),
        (
            ["--set", "optim.name=muon"],
            "override optim.name: finetune does not use this setting; of optim, it uses only peak_lr, end_lr, "
            "warmup_epochs, weight_decay, betas, clip_grad, layer_decay",
        ),
        (["--set", 'train={"hours": 1}'], "override train.hours: finetune does not use this setting; of train, it"),
        (["--set", "optim.peek_lr=1"], "unknown key optim.peek_lr; did you mean optim.peak_lr?"),
        (["--set", "finetune.rand_augment=strong"], "set it to a string such as rand-m9"),
        (["--set", "train.steps=3", "--set", "train.epochs=2"], "set epochs or steps"),
        (["--set", "train.global_batch=7", "--set", "train.micro_batch=0"], "micro_batch"),
        (["--resume", "nowhere"], "neither a checkpoint nor a run folder"),
    ],
)
def test_user_errors_are_reported_in_one_line(run, shards, tmp_path, capsys, options, message):
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main([*command, *options])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_different_settings_is_refused(transfer, run, shards, tmp_path, capsys):
    transfer("finetune", *settings(epochs=1))
    (tmp_path / "out/result.json").unlink()
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main([*command, *settings(epochs=1)])) == 2
    assert "add --resume auto" in capsys.readouterr().err
    more = labelled_tar(tmp_path / "more.tar", range(96))
    for other, message in (
        (settings(pool="mean"), "classifier.pool = cls"),
        (settings(global_batch=8), "global_batch = 16"),
        (settings(mixup=0.1), "finetune.mixup = 0"),
        (["--set", "data.flip=false"], "data.flip = True"),
        (["--train", more], "data.train = 1 shards with 48 samples"),
        (["--labels", "json.name"], "classifier.classes"),
        (["random:" + command[1]], f"task.model = {run}"),
    ):
        if other[0].startswith("random:"):
            command[1:2], other = other, []
        assert exit_cleanly(partial(main, [*command, *settings(epochs=1), *other, "--resume", "auto"])) == 2
        assert message in capsys.readouterr().err


def test_every_setting_takes_effect_and_partners_are_in_one_micro_batch(run, tmp_path, monkeypatch):
    """Settings of the samples and of the network change the loss of the first step. Settings of the optimiser change
    the loss of a later step. The betas have no effect before the third step, because the first update of Adam does not
    depend on them. Each lane has an even number of samples in a step."""
    steps = {"global_batch": 12, "micro_batch": 6, "precision": "fp32"}
    sampling = {"label_smoothing": 0.3, "mixup": 0.1, "cutmix": 0.1, "switch_prob": 0.9, "rand_augment": None}
    network, optimiser = (
        {"drop_path": 0.6, "pool": "mean"},
        {"layer_decay": 0.9, "weight_decay": 5.0, "betas": (0.5, 0.9)},
    )
    found = {}

    def first_losses(job, name="", value=None):
        given = steps | ({name: value} if name else {})
        changed = {}
        for section in ("finetune", "optim", "train"):
            own = {key: given[key] for key in given.keys() & {*FINETUNE.keys(section)}}
            changed[section] = getattr(job.config, section).model_copy(update=own)
        job = replace(job, config=job.config.model_copy(update=changed), model=deepcopy(job.model))
        task, trainer = finetune.set_up(job)
        assert trainer.stream["data.order"].startswith("3 lanes, ")
        losses, batches = [], iter(trainer.train_loader)
        for _ in range(3):
            parts = [next(batches) for _ in range(2)]
            for part in parts:
                assert len(part.keys) == 6 and {task.model.mixing.pair(p)[0] for p in part.positions} == {
                    *part.positions
                }
            losses.append(sum(each.loss.item() for each in trainer.engine.step(parts, 12.0, 1e-2)[0]))
        return losses

    def prepare(job):
        found[""] = first_losses(job)
        found.update({name: first_losses(job, name, new) for name, new in (sampling | network | optimiser).items()})

    monkeypatch.setattr(finetune, "run", prepare)
    train = [labelled_tar(tmp_path / f"{number}.tar", range(12 * number, 12 * number + 12)) for number in range(4)]
    options = ["--val", train[0], "--out", str(tmp_path / "out"), "--no-baselines", "--set", "data.workers=0"]
    assert main(["finetune", str(run), "--train", *train, *options]) == 0
    first, *_, last = found.pop("")
    for name, losses in found.items():
        assert (losses[0] != first) == (name not in optimiser), name
        assert losses[-1] != last, name


@pytest.mark.parametrize("total", [40, 1000, 30_000])
@pytest.mark.parametrize("held_out", [10, 3000, 200_000])
def test_the_default_period_limits_the_number_and_the_time_of_evaluations(total, held_out):
    """In an evaluation, a sample takes a third of the time that it takes in a training step."""
    schedule, share = SimpleNamespace(total_steps=total, steps_per_epoch=7), SimpleNamespace(global_batch=64)
    task = SimpleNamespace(start=SimpleNamespace(val=SimpleNamespace(samples=held_out)))
    trainer = SimpleNamespace(schedule=schedule, share=share)
    period = finetune.FineTuningTask._default_period(task, trainer)

    def allowed(period):
        return period >= max(7, total // 10) and held_out / 3 <= period * 64 / 20 + 1e-6

    assert allowed(period) and not allowed(period - 1)


def test_settings_that_affect_the_samples_must_not_change_when_a_run_resumes():
    """A new setting must be listed here or be refused by `finetune.RULES`."""
    schedule = {"train.epochs", "train.steps", "optim.warmup_epochs", "optim.peak_lr", "optim.end_lr"}
    optimiser = {f"optim.{name}" for name in ("weight_decay", "betas", "clip_grad", "layer_decay")}
    loop = {"log_every", "eval_every", "save_every", "keep", "micro_batch", "activation_checkpointing", "compile"}
    loop = {f"train.{name}" for name in (*loop, "ema", "precision")}
    of_the_classifier = {"finetune.pool", "finetune.drop_path"}
    names = {f"{section}.{key}" for section in ("finetune", "optim", "train") for key in FINETUNE.keys(section)}
    refused = {name for name in names if finetune.RULES.severity(name) == "refused"}
    assert refused == names - schedule - optimiser - loop - of_the_classifier
    assert {finetune.RULES.severity(f"classifier.{name}") for name in ("pool", "model.drop_path")} == {"refused"}
    for rules, names in ((finetune.RULES, ["task.model"]), (linear.RULES, ["task.weights", "task.classes"])):
        for name in [*names, "run.seed", "data.crop_scale", "data.flip", "data.repeats"]:
            assert rules.severity(name) == "refused", name


def _labelled_batch(model, count, first=0, only=None):
    """Return a batch of the samples at positions `first` to `first + count`, or of those in `only`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    visible = torch.zeros(4, dtype=torch.bool)
    samples = [Sample(str(i), images[i], visible, label=i % 3, position=first + i) for i in only or range(count)]
    return pack(samples, model.geometry)


def _sizes():
    return ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)


def _mixing(repeats=1, seed=0, **settings):
    return Mixing(FineTuneConfig(**{"label_smoothing": 0.0, **settings}), _sizes(), 3, True, seed, repeats)


def _plain(batch):
    mean, std = (torch.tensor(v)[:, None, None] for v in (_sizes().image_mean, _sizes().image_std))
    return (batch.images / 255 - mean) / std


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_consecutive_samples_are_mixed_and_labels_are_mixed_with_the_same_weights(mixup, cutmix):
    batch = _labelled_batch(MultimodalEncoder(_sizes()), 31, first=64)
    mixed, labels = _mixing(mixup=mixup, cutmix=cutmix)(batch, torch.float32)
    plain = _plain(batch)
    torch.testing.assert_close(labels.sum(1), torch.ones(31))
    torch.testing.assert_close(mixed.images[30], plain[30])  # the partner of this sample is in another batch
    assert labels[30].tolist() == [1, 0, 0]
    shares, covered = set(), torch.zeros(batch.images.shape[-2:], dtype=torch.bool)
    for row in range(30):
        partner = row ^ 1
        own = labels[row, row % 3].item()  # adjacent samples have different classes
        assert labels[row, partner % 3].item() == pytest.approx(1 - own, abs=1e-6)
        assert labels[partner, partner % 3].item() == pytest.approx(own)
        shares.add(own)
        if mixup:
            torch.testing.assert_close(mixed.images[row], own * plain[row] + (1 - own) * plain[partner])
            continue
        same = (mixed.images[row] == plain[row]).all(0)
        assert same.double().mean().item() == pytest.approx(own, abs=1e-6)
        assert torch.equal(mixed.images[row][:, ~same], plain[partner][:, ~same])
        taken, covered = (~same).nonzero(), covered | ~same
        if len(taken):  # the part that comes from the partner is a rectangle
            sides = taken.max(0).values - taken.min(0).values + 1
            assert sides.prod() == len(taken)
    assert len(shares) >= 8
    assert mixup or all(edge.any() for edge in (covered[0], covered[-1], covered[:, 0], covered[:, -1]))


def test_mixing_depends_only_on_the_position_in_the_sample_stream():
    model = MultimodalEncoder(_sizes())
    mixing, images, labels = _mixing(mixup=0.8, cutmix=1.0), [], []
    whole, whole_labels = mixing(_labelled_batch(model, 24), torch.float32)
    for first in (16, 0, 8):
        np.random.seed(first)
        mixed, soft = mixing(_labelled_batch(model, 24, only=range(first, first + 8)), torch.float32)
        images.append(mixed.images)
        labels.append(soft)
    assert torch.equal(torch.cat((images[1], images[2], images[0])), whole.images)
    assert torch.equal(torch.cat((labels[1], labels[2], labels[0])), whole_labels)
    for other in (_mixing(mixup=0.8, cutmix=1.0, seed=1), _mixing(mixup=0.8, cutmix=0.0)):
        assert not torch.equal(other(_labelled_batch(model, 24), torch.float32)[0].images, whole.images)
    batch = _labelled_batch(model, 24)
    later = replace(batch, positions=[position + 24 for position in batch.positions])
    assert not torch.equal(mixing(later, torch.float32)[0].images, whole.images)


def test_mixup_and_cutmix_are_applied_with_the_configured_probabilities():
    batch = _labelled_batch(MultimodalEncoder(_sizes()), 400)
    for switch, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)):
        mixed, _ = _mixing(mixup=1.0, cutmix=1.0, switch_prob=switch)(batch, torch.float32)
        plain = _plain(batch)
        either = (mixed.images == plain) | (mixed.images == plain[torch.arange(400) ^ 1])
        assert low <= either.flatten(1).all(1).double().mean() <= high


def test_a_sample_without_its_partner_is_not_mixed_and_views_are_mixed_with_views_of_another_sample():
    model = MultimodalEncoder(_sizes())
    batch = _labelled_batch(model, 8, only=[0, 2, 3, 5, 7])
    mixed, _ = _mixing(mixup=0.8)(batch, torch.float32)
    moved = [(mixed.images[row] != _plain(batch)[row]).any().item() for row in range(5)]
    assert moved == [False, True, True, False, False]
    batch = _labelled_batch(model, 4)  # two views of each of two samples
    _, labels = _mixing(mixup=0.8, repeats=2)(replace(batch, labels=torch.tensor([0, 0, 1, 1])), torch.float32)
    assert ((labels[:, :2] > 0) & (labels[:, :2] < 1)).all()
    assert labels[0, 0] != labels[1, 0], "the mixing weight of each view is drawn independently"


@pytest.mark.parametrize(("batch", "world", "repeats", "fits"), [(24, 3, 1, True), (28, 4, 1, False), (16, 3, 1, False),
                                                               (24, 4, 2, False), (24, 3, 2, True)])  # fmt: skip
def test_micro_batches_that_separate_mixing_partners_are_refused(batch, world, repeats, fits):
    mixing = _mixing(repeats=repeats)
    if fits:
        return mixing.check_share(Share(batch, 1, 0, world))
    with pytest.raises(
        UserError,
        match=f"a multiple of {2 * repeats} samples, but {batch} samples are split into {world} micro-batches",
    ):
        mixing.check_share(Share(batch, 1, 0, world))
    _mixing(repeats=repeats, mixup=0, cutmix=0).check_share(Share(batch, 1, 0, world))


@pytest.mark.parametrize(("lanes", "repeats"), [(1, 1), (4, 1), (8, 1), (1, 3), (2, 3), (8, 3)])
def test_a_sample_and_its_mixing_partner_are_in_the_same_micro_batch(lanes, repeats):
    mixing = Mixing(FineTuneConfig(), _sizes(), 3, True, 0, repeats, lanes)
    drawn = {}
    for world, parts in ((1, 1), (2, 2), (4, 1)):
        for rank in range(world):
            share = Share(48, parts, rank, world)
            mixing.check_share(share)
            for positions in MicroBatches(range(1, 3), share, lanes, repeats):
                for position in positions:
                    other, *pair = mixing.pair(position)
                    assert other != position and other in positions and mixing.pair(other) == (position, *pair)
                    assert drawn.setdefault(position, pair) == pair
    assert sorted(drawn) == list(range(48, 144))
    assert len({tuple(pair) for pair in drawn.values()}) == 48


def test_labels_are_smoothed_once_with_and_without_mixing():
    sizes = _sizes()
    batch = _labelled_batch(MultimodalEncoder(sizes), 4)
    for mixup, images_only in ((0.8, True), (0.8, False), (0.0, True)):
        mixing = Mixing(FineTuneConfig(mixup=mixup, cutmix=0, label_smoothing=0.3), sizes, 3, images_only, 0)
        _, labels = mixing(replace(batch, labels=torch.tensor([0, 0, 1, 1])), torch.float32)
        assert labels[0].tolist() == pytest.approx([0.8, 0.1, 0.1])  # it is mixed with an image of its class


def test_rand_augment_depends_only_on_its_seed():
    sizes = _sizes()
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    augment = RandAugment("rand-m9-mstd0.5-inc1", sizes)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = [augment(image, seed) for seed in range(6)]
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(5)
    assert all(torch.equal(one, augment(image, seed)) for seed, one in enumerate(first))
    assert len({one.numpy().tobytes() for one in first}) > 3


def test_rand_augment_is_that_of_timms_training_transform():
    """The sizes of shifts and the colour of the pixels outside the image are those of timm."""
    config, mean = "rand-m7-n3-mstd0.5-inc1", (0.1, 0.5, 0.9)
    sizes = ModelConfig(**_sizes().model_dump() | {"size": None, "image_size": 48, "image_mean": mean})
    whole = transforms_imagenet_train(48, auto_augment=config, mean=mean)
    (theirs,) = (each for each in whole.transforms if isinstance(each, auto_augment.RandAugment))
    ours = RandAugment(config, sizes)
    for seed in range(40):
        image = torch.randint(256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        random.seed(seed)
        np.random.seed(seed)
        expected = np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))
        assert np.array_equal(ours(image, seed).permute(1, 2, 0), expected), seed


def test_rand_augment_accepts_the_highest_magnitudes():
    """At the highest magnitude, timm's posterize would leave 0 bits."""
    sizes = _sizes()
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    augment = RandAugment("rand-m10-n15-inc1", sizes)
    assert all(augment(image, seed).shape == image.shape for seed in range(20))


def test_training_accuracy_uses_the_class_with_the_largest_weight_in_the_mixed_label():
    """Losses are computed with soft labels, summed over the batch, and divided by the number of samples of the step."""
    config = ClassifierConfig(model=_sizes(), head="finetune", pool="cls", modality="image", classes=[0, 1, 2])
    mixing = _mixing(mixup=1.0, cutmix=0.0, label_smoothing=0.1)
    torch.manual_seed(0)
    model = TrainableClassifier(config, mixing).train()
    model.backbone.reset_parameters()
    batch = _labelled_batch(model.backbone, 40)
    mixed, labels = mixing(batch, torch.float32)
    logits = Classifier.forward(model, mixed)
    losses = model(batch, 50.0)
    torch.testing.assert_close(losses.loss, -(labels * logits.log_softmax(1)).sum() / 50)
    likeliest = labels.argmax(1)
    assert (likeliest != batch.labels).any()
    assert losses.accuracy.item() == pytest.approx((logits.argmax(1) == likeliest).sum().item() / 50)
    assert (logits.argmax(1) == likeliest).sum() != (logits.argmax(1) == batch.labels).sum()
    model.eval()
    torch.testing.assert_close(model(batch), Classifier.forward(model, batch))
