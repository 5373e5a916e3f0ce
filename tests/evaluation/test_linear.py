import json
import re
from types import SimpleNamespace

import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.cli.evaluate import main
from m3ae_fast.evaluation import finetune, linear
from m3ae_fast.evaluation.linear import ProbeEngine
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training import throughput
from m3ae_fast.weights.open_model import open_model
from tests.evaluation.conftest import figure_names, settings
from tests.helpers import bank_cases
from tests.helpers.labelled import labelled_members, labelled_tar
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import write_tar

pytestmark = pytest.mark.slow

FAST = settings("optim.peak_lr=30", "train.global_batch=24", "train.micro_batch=8", "optim.warmup_epochs=2")


def test_images_of_three_colours_are_classified_correctly(transfer, run, tmp_path):
    result = transfer("linear", "--labels", "json.name", *FAST, *settings("train.epochs=15"))
    assert (result["top1"], result["steps"], result["classes"]) == (1.0, 30, 3)
    assert figure_names(tmp_path / "out") == ["confusion", "training"]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum("val_top1" in line for line in lines) == 15  # one line per epoch
    classifier = Classifier.from_pretrained(tmp_path / "out").eval()
    assert classifier.config.classes == ["blue", "green", "red"]
    encoder = open_model(str(run), text=False)
    assert torch.equal(classifier.backbone.patch_embed.weight, encoder.patch_embed.weight)  # the encoder was frozen


def test_steps_equal_lars_on_the_loss_of_the_whole_batch():
    """The expected weights are computed with LARS' formulas. A checkpoint may read the state until `before_update` is
    called."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(12, 8, generator=generator), torch.arange(12) % 3
    config = bank_cases.config(optim={"weight_decay": 0.3}, encode={"precision": "fp32"})
    with join_ranks() as ranks:
        head = LinearHeads(8, 3, [0])
        weights = [p[0].detach().clone().requires_grad_() for p in (head.linear.weight, head.linear.bias)]
        buffers = [torch.zeros_like(p) for p in weights]
        encoder = torch.nn.Linear(8, 8)
        encoder.pooled = lambda batch, pool: features[batch.rows]
        engine = ProbeEngine(head, config, ranks, encoder)
        readable = []
        engine.before_update = lambda: readable.append({k: v.clone() for k, v in engine._tensors().items()})
        parts = [SimpleNamespace(rows=rows, labels=labels[rows]) for rows in (slice(6), slice(6, 12))]
        normal = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
        for step, lr in enumerate((0.5, 0.25, 0.125)):
            state = {name: tensor.clone() for name, tensor in engine._tensors().items()}
            (losses,), norm = engine.step(parts, 12.0, lr=lr)
            assert len(readable) == step + 1 and all(torch.equal(readable[step][name], t) for name, t in state.items())
            loss = torch.nn.functional.cross_entropy(normal @ weights[0].T + weights[1], labels)
            gradients = torch.autograd.grad(loss, weights)
            torch.testing.assert_close(losses.loss, loss.detach())
            torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
            for p, gradient, buffer in zip(weights, gradients, buffers):
                update = gradient + 0.3 * p.detach()
                if p.any():  # the bias is 0 at first, and its update is then not scaled
                    update = 1e-3 * p.detach().norm() / update.norm() * update
                buffer.mul_(0.9).sub_(lr * update)
                p.data += buffer
    for found, expected in zip((head.linear.weight, head.linear.bias), weights):
        torch.testing.assert_close(found[0].detach(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_the_initial_weights_of_a_head_depend_on_the_seed(run, shards, tmp_path, monkeypatch, task):
    module, weights = {"linear": linear, "finetune": finetune}[task], []

    def set_up(job):
        prepared, _ = module.set_up(job)
        head = prepared.heads if task == "linear" else prepared.model.head
        weights.append(head.linear.weight.detach().clone())

    monkeypatch.setattr(module, "run", set_up)
    data = ["--train", shards[0], "--val", shards[1], "--set", "data.workers=0", "--no-baselines"]
    for number, seed in enumerate((1, 1, 2)):
        assert main([task, str(run), *data, "--out", str(tmp_path / str(number)), "--set", f"run.seed={seed}"]) == 0
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_resumed_probe_has_the_result_of_an_uninterrupted_one(transfer, run, tmp_path, monkeypatch):
    options = [*FAST, *settings("train.steps=6", "train.save_every=2")]
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
    with pytest.raises(UserError, match="already contains checkpoints"):
        transfer("linear", *options, out="cut")
    for other, was in (("encode.pool=cls", "mean"), ("train.global_batch=48", "24")):
        name, _, now = other.partition("=")
        with pytest.raises(UserError, match=f"was made with {name} = {was}, but the config has {now}"):
            transfer("linear", *options, "--resume", "auto", *settings(other), out="cut")
    with pytest.raises(UserError, match=r"was made with task\.weights = .*, but the config has"):
        transfer("linear", *options, "--resume", "auto", model=f"random:{run}", out="cut")
    same = run.parent / "." / run.name / "checkpoints" / ".."  # another path to the same weights
    resumed = transfer("linear", *options, "--resume", "auto", model=same, out="cut")
    assert resumed["top1"] == whole["top1"]
    states = [checkpoint.saved_steps(tmp_path / name)[-1] / "state.safetensors" for name in ("whole", "cut")]
    assert states[0].read_bytes() == states[1].read_bytes()
    steps = [
        [line["step"] for line in read_metrics(tmp_path / name) if "val_top1" in line] for name in ("whole", "cut")
    ]
    assert steps == [[2, 4, 6]] * 2, "no evaluation is repeated"


def test_held_out_samples_may_be_of_one_class(transfer, tmp_path):
    """The held-out samples are normalised with the statistics of the training samples, not with their own."""
    val = labelled_tar(tmp_path / "red.tar", range(101, 125, 3))
    result = transfer("linear", *FAST, *settings("train.epochs=15", "encode.pool=cls"), val=val)
    assert (result["top1"], result["val_samples"], result["train_samples"]) == (1.0, 8, 48)
    saved = Classifier.from_pretrained(tmp_path / "out").config
    assert (saved.pool, saved.head, saved.modality, saved.classes) == ("cls", "linear", "image", [0, 1, 2])


def test_the_fraction_of_bad_samples_is_relative_to_the_samples_read(transfer, tmp_path):
    """One of five samples is bad."""
    broken = [("99.png", b""), ("99.txt", b"red"), ("99.cls", b"2")]
    train = write_tar(tmp_path / "train.tar", [*labelled_members(range(4)), *broken])
    options = settings("train.global_batch=5", "train.micro_batch=5", "train.steps=2")
    result = transfer("linear", *options, *settings("data.max_bad_fraction=0.2"), train=train)
    assert result["skipped"] == 2
    with pytest.raises(UserError, match="1 of 5 samples cannot be used"):
        transfer("linear", *options, *settings("data.max_bad_fraction=0.19"), train=train, out="other")


def test_throughput_is_measured_since_the_previous_log_line(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    meter = throughput.SampleRate()
    meter.add(throughput.SampleCounts(samples=12, skipped=1), waited=0.5)
    meter.add(throughput.SampleCounts(samples=8, skipped=0), waited=0.5)
    clock[0] = 104.0
    assert meter.rates() == {"samples_per_s": 5, "data_wait": 0.25}
    meter.add(throughput.SampleCounts(samples=4, skipped=0), waited=0.0)
    clock[0] = 106.0
    assert meter.rates() == {"samples_per_s": 2, "data_wait": 0}


def test_two_ranks_take_the_same_steps_as_one(transfer, run, shards, tmp_path):
    options = [*FAST, *settings("train.steps=3", "encode.batch=4", "encode.precision=fp32")]
    transfer("linear", *options, out="one")
    command = ["linear", str(run), "--train", shards[0], "--val", shards[1], "--out", str(tmp_path / "two")]
    command += [*settings("data.workers=0"), *options]
    code, out = run_ranks("m3ae_fast.cli.evaluate", command, 2, tmp_path / "log")
    assert code == 0, out
    one, two = (checkpoint.read_weights(checkpoint.locate(tmp_path / name)) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_learning_rate_that_is_too_high_leads_to_an_error_of_one_line(transfer):
    with pytest.raises(UserError, match=r"not finite.*lower optim.peak_lr"):
        transfer("linear", *FAST, *settings("optim.peak_lr=1e30", "train.steps=20"))


def test_the_settings_are_printed_before_the_first_step_and_the_duration_soon_after(transfer, capsys):
    transfer("linear", *FAST, *settings("train.epochs=5"))
    out = capsys.readouterr().out
    line = "48 samples, batch 24, steps 0 to 10 (5 epochs, including 2 of warm-up), learning rate 2.81 = "
    line += "optim.peak_lr 30 x batch 24 / 256"
    assert out.index(line) < out.index("step 1 ") < out.index("expected duration: ")
    assert re.search(r"for [1-4] more steps", out)
