"""Fine-tuning learns, resumes as if never interrupted, and leaves a classifier that loads."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.errors import exit_cleanly
from m3ae_fast.run import checkpoint
from m3ae_fast.run.run_log import read_metrics
from m3ae_fast.transfer import finetune_loop
from m3ae_fast.transfer.__main__ import main
from m3ae_fast.transfer.augment import Mixing, RandAugment
from m3ae_fast.transfer.classifier import Classifier
from tests.helpers.labelled import coloured
from tests.helpers.ranks import run_ranks

QUICK = {
    "global_batch": 16, "micro_batch": 8, "epochs": 4, "warmup_epochs": 0, "peak_lr": 3e-3, "mixup": 0, "cutmix": 0,
    "rand_augment": None, "precision": "fp32", "log_every": 1,
}  # fmt: skip


def settings(**changed):
    return [o for key, value in (QUICK | changed).items() for o in ("--set", f"finetune.{key}={json.dumps(value)}")]


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
def test_it_learns_and_its_classifier_loads(transfer, tmp_path, modality, changed):
    result = transfer("finetune", "--modality", modality, *settings(**changed))
    assert result["task"] == "finetune" and result["top1"] >= 0.7 and "top5" not in result
    model = Classifier.from_pretrained(tmp_path / "out").eval()
    assert model.config.classes == [0, 1, 2] and model.config.modality == modality
    if modality == "text":
        return
    samples = []
    for number in range(100, 118):
        from m3ae_fast.batch.crops import centre_crop
        from m3ae_fast.batch.images import decode_image

        image = centre_crop(decode_image(coloured(number, ("blue", "green", "red")[number % 3]), 3), 32)
        samples.append(Sample(str(number), image, torch.zeros(16, dtype=torch.bool)))
    if modality == "image":
        with torch.no_grad():
            found = model(pack(samples, model.backbone.geometry)).argmax(1)
        share = (found == torch.arange(100, 118) % 3).double().mean().item()
        assert share == pytest.approx(result["top1"])


def test_resumed_is_as_never_interrupted(transfer, tmp_path, capsys):
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


def test_a_stop_request_ends_an_evaluation_and_loses_nothing(transfer, run, shards, tmp_path, monkeypatch):
    options = settings(epochs=2, eval_every=3)
    whole = transfer("finetune", *options, out="whole")
    best, calls = finetune_loop.best_classes, []

    def signalled(scores):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return best(scores)

    monkeypatch.setattr(finetune_loop, "best_classes", signalled)
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
    assert evaluated[0] == evaluated[1], "what the stop cut short is made up for"


def test_ranks_and_zero_change_nothing(transfer, run, shards, tmp_path):
    options = settings(epochs=1, drop_path=0, label_smoothing=0.1, micro_batch=4, ema=0.7)
    transfer("finetune", *options, out="one")
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "two")]
    command += ["--set", "data.workers=0", *options]
    command += ["--set", 'finetune.deepspeed={"zero_optimization": {"stage": 3}}']
    code, out = run_ranks("m3ae_fast.transfer.__main__", command, 2, tmp_path / "log")
    assert code == 0, out[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["top1"] == results[1]["top1"]
    averages = [Classifier.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, weight in averages[0].items():
        other = averages[1][name]
        if name.endswith("qkv.bias"):
            # softmax does not see the keys' bias: its gradient is only rounding, which Adam blows up
            weight, other = (torch.cat(bias.chunk(3)[::2]) for bias in (weight, other))
        np.testing.assert_allclose(other, weight, rtol=2e-3, atol=1e-4)
    last = checkpoint.open_state(checkpoint.saved_steps(tmp_path / "one")[-1])
    assert torch.equal(averages[0]["head.linear.weight"], last("ema/head.linear.weight"))
    assert not torch.allclose(averages[0]["head.linear.weight"], last("model/head.linear.weight"), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "finetune.mixupp=1"], "did you mean mixup?"),
        (["--set", "finetune.rand_augment=strong"], "write it like rand-m9"),
        (["--set", "finetune.steps=3", "--set", "finetune.epochs=2"], "give epochs or steps"),
        (["--set", "finetune.global_batch=7", "--set", "finetune.micro_batch=0"], "micro_batch"),
        (["--resume", "nowhere"], "neither a checkpoint nor a run folder"),
    ],
)
def test_mistakes_are_one_line(run, shards, tmp_path, capsys, options, message):
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main([*command, *options])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_settings_is_refused(transfer, run, shards, tmp_path, capsys):
    transfer("finetune", *settings(epochs=1))
    (tmp_path / "out/result.json").unlink()
    command = ["finetune", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "out")]
    assert exit_cleanly(lambda: main([*command, *settings(epochs=1)])) == 2
    assert "add --resume auto" in capsys.readouterr().err
    for other, message in (({"pool": "mean"}, "classifier.pool = cls"), ({"global_batch": 8}, "global_batch = 16")):
        options = [*settings(epochs=1, **other), "--resume", "auto"]
        assert exit_cleanly(partial(main, [*command, *options])) == 2
        assert message in capsys.readouterr().err


def _labelled_batch(model, count):
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            str(i),
            torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator),
            torch.zeros(4, dtype=torch.bool),
            label=i % 3,
        )
        for i in range(count)
    ]
    return pack(samples, model.geometry)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_pictures_have_labels_of_the_same_weights(mixup, cutmix):
    from m3ae_fast.config import ModelConfig
    from m3ae_fast.model.encoder import MultimodalEncoder

    sizes = ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)
    batch = _labelled_batch(MultimodalEncoder(sizes), 5)
    mixing = Mixing(FineTuneConfig(mixup=mixup, cutmix=cutmix, label_smoothing=0.0), sizes, 3, images_only=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (sizes.image_mean, sizes.image_std))
    plain = (batch.images / 255 - mean) / std
    np.random.seed(3)
    mixed, labels = mixing(batch, torch.float32)
    torch.testing.assert_close(labels.sum(1), torch.ones(5))
    torch.testing.assert_close(mixed.images[4], plain[4])  # the odd one
    assert labels[4].tolist() == [0, 1, 0]
    weight = labels[0, 0].item()  # image 0 (class 0) with image 3 (class 0), 1 (class 1) with 2 (class 2)
    assert weight == pytest.approx(1.0)
    own = labels[1, 1].item()
    assert 0 < own < 1 and labels[1, 2].item() == pytest.approx(1 - own, abs=1e-6)
    if mixup:
        torch.testing.assert_close(mixed.images[1], own * plain[1] + (1 - own) * plain[2])
    else:
        same = (mixed.images[1] == plain[1]).all(0)
        assert same.double().mean().item() == pytest.approx(own, abs=1e-6)
        assert torch.equal(mixed.images[1][:, ~same], plain[2][:, ~same])


def test_labels_are_smoothed_once_whether_mixed_or_not():
    from m3ae_fast.config import ModelConfig
    from m3ae_fast.model.encoder import MultimodalEncoder

    sizes = ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)
    batch = _labelled_batch(MultimodalEncoder(sizes), 4)
    for mixup, images_only in ((0.8, True), (0.8, False), (0.0, True)):
        mixing = Mixing(FineTuneConfig(mixup=mixup, cutmix=0, label_smoothing=0.3), sizes, 3, images_only)
        _, labels = mixing(batch, torch.float32)
        assert labels[0].tolist() == pytest.approx([0.8, 0.1, 0.1])  # mixed with an image of its class


def test_rand_augment_depends_on_its_seed_alone():
    from m3ae_fast.config import ModelConfig

    sizes = ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    augment = RandAugment("rand-m9-mstd0.5-inc1", sizes)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = [augment(image, seed) for seed in range(6)]
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(5)
    assert all(torch.equal(one, augment(image, seed)) for seed, one in enumerate(first))
    assert len({one.numpy().tobytes() for one in first}) > 3


def test_rand_augment_takes_the_highest_levels():
    """At which timm's posterize leaves 0 bits."""
    from m3ae_fast.config import ModelConfig

    sizes = ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    augment = RandAugment("rand-m10-n15-inc1", sizes)
    assert all(augment(image, seed).shape == image.shape for seed in range(20))
