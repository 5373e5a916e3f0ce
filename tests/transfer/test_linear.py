import json

import pytest
import torch

from m3ae_fast.config.transfer import EncodeConfig, ProbeConfig
from m3ae_fast.engine import checkpoint
from m3ae_fast.engine.ranks import join_ranks
from m3ae_fast.errors import UserError
from m3ae_fast.transfer.classifier import Classifier
from m3ae_fast.transfer.heads import LinearProbeHead
from m3ae_fast.transfer.models import load_model
from m3ae_fast.transfer.probe_engine import EncodedBatch, ProbeEngine
from tests.helpers.ranks import run_ranks
from tests.transfer.conftest import pictures, settings

FAST = settings("probe.peak_lr=30", "probe.global_batch=24", "probe.micro_batch=8", "probe.warmup_epochs=2")


@pytest.mark.parametrize("options", [["--cache-features"], []])
def test_colours_are_told_apart(transfer, run, tmp_path, options):
    result = transfer("linear", "--labels", "json.name", *options, *FAST, *settings("probe.epochs=15"))
    assert (result["top1"], result["steps"], result["classes"]) == (1.0, 30, 3)
    assert pictures(tmp_path / "out") == ["confusion", "training"]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum("val_top1" in line for line in lines) == 15  # every epoch
    classifier = Classifier.from_pretrained(tmp_path / "out").eval()
    assert classifier.config.classes == ["blue", "green", "red"]
    encoder = load_model(str(run), text=False)
    assert torch.equal(classifier.backbone.patch_embed.weight, encoder.patch_embed.weight)  # it was frozen


def test_a_step_is_one_of_lars_on_the_loss_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(12, 8, generator=generator), torch.arange(12) % 3
    with join_ranks() as ranks:
        head = LinearProbeHead(8, 3)
        weight = head.linear.weight.detach().clone()
        engine = ProbeEngine(head, ProbeConfig(), ranks, None, EncodeConfig())
        parts = [EncodedBatch(list("abcdef"), features[:6], labels[:6]), EncodedBatch([], features[6:], labels[6:])]
        (losses,), _ = engine.step(parts, 12.0, lr=0.5)
    normal = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    weight.requires_grad_()
    loss = torch.nn.functional.cross_entropy(normal @ weight.T, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(losses.loss, loss.detach())
    expected = weight - 0.5 * 1e-3 * weight.norm() / gradient.norm() * gradient
    torch.testing.assert_close(head.linear.weight.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [["--cache-features"], []])
def test_a_resumed_probe_is_the_one_that_was_interrupted(transfer, tmp_path, monkeypatch, options):
    options = [*options, *FAST, *settings("probe.steps=6", "probe.save_every=2")]
    whole = transfer("linear", *options, out="whole")
    save = checkpoint.save

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise UserError("killed")

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(UserError, match="killed"):
        transfer("linear", *options, out="cut")
    assert not (tmp_path / "cut/result.json").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="already holds checkpoints"):
        transfer("linear", *options, out="cut")
    with pytest.raises(UserError, match=r"was made with encode.pool = mean, the config says cls"):
        transfer("linear", *options, "--resume", "auto", *settings("encode.pool=cls"), out="cut")
    resumed = transfer("linear", *options, "--resume", "auto", out="cut")
    assert resumed["top1"] == whole["top1"]
    states = [checkpoint.saved_steps(tmp_path / name)[-1] / "state.safetensors" for name in ("whole", "cut")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_two_ranks_take_the_steps_of_one(transfer, run, shards, tmp_path):
    options = [*FAST, *settings("probe.steps=3", "encode.batch=4", "encode.precision=fp32")]
    transfer("linear", *options, out="one")
    command = ["linear", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "two")]
    command += [*settings("data.workers=0"), *options]
    code, out = run_ranks("m3ae_fast.transfer.__main__", command, 2, tmp_path / "log")
    assert code == 0, out
    one, two = (checkpoint.read_weights(checkpoint.locate(tmp_path / name)) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_learning_rate_that_is_too_high_ends_in_one_line(transfer):
    with pytest.raises(UserError, match=r"not finite.*lower probe.peak_lr"):
        transfer("linear", "--cache-features", *FAST, *settings("probe.peak_lr=1e30", "probe.steps=20"))
