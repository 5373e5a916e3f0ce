"""The training loop passes the right arguments to the engine, and uses its results correctly. The engine of these tests
records its calls."""

import argparse
import dataclasses
import itertools
import json
import math
import pickle
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import m3ae_fast.training.run as run_module
from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.batch.packing import pack
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.checkpoint.saver import Saver
from m3ae_fast.config import Config, MaskingConfig, OptimConfig, SourceConfig, TrainConfig, parse
from m3ae_fast.data import Data, ShardStore, open_corpus, open_data
from m3ae_fast.data.loader import collate
from m3ae_fast.engine import feed as feed_module
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.muon import orthogonalisation_flops
from m3ae_fast.engine.optimizer import clip_by_global_norm
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.engine.validation_metrics import evaluate
from m3ae_fast.evaluation.knn_during_training import knn_probe
from m3ae_fast.model.flops import executed_flops, reference_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.process.session import joined_program
from m3ae_fast.process.stoppable_loop import Stopped, until_stopped
from m3ae_fast.training import throughput
from m3ae_fast.training.loss_watch import LossWatch
from m3ae_fast.training.run import pre_train, preparation_of
from m3ae_fast.training.throughput import SampleCounts, StepCounts, Throughput, newton_schulz_flops
from m3ae_fast.training.trainer import Trainer
from m3ae_fast.training.user_warnings import MemoryGrowth, run_warnings
from tests.helpers.checkpoints import save
from tests.helpers.shards import members, picture, write_tar
from tests.helpers.trainer import TINY
from tests.test_model import MIXED, make_sample
from tests.test_model import TINY as SMALL

pytestmark = pytest.mark.slow

HALF_PREDICTED = {"image_predicted": 0.5, "text_predicted": 0.5}


@dataclass
class Recorder:
    """An engine that records its arguments."""

    engine: object
    batches: list = field(default_factory=list)
    counts: list = field(default_factory=list)
    lrs: list = field(default_factory=list)
    # losses to return in place of the true ones, by number of the step (from 1)
    bad: dict = field(default_factory=dict)
    held_out: float | None = None  # the image loss that evaluations return in place of the true one

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def step(self, batches, counts, lr):
        self.batches.append(batches)
        self.counts.append(counts)
        self.lrs.append(lr)
        losses, norm = self.engine.step(batches, counts, lr)
        if loss := self.bad.get(len(self.lrs)):
            losses[-1] = losses[-1]._replace(loss=torch.tensor(loss))
        return losses, norm

    def evaluate(self, batch):
        losses = self.engine.evaluate(batch)
        return losses if self.held_out is None else losses._replace(image_loss=torch.tensor(self.held_out))


@pytest.fixture
def mixed(tmp_path):
    """Return sources with 24 pairs, 12 images, 12 captions, and four pairs, one of which cannot be used."""
    write_tar(tmp_path / "p.tar", members(range(24)))
    write_tar(tmp_path / "i.tar", members(range(24, 36), "image"))
    write_tar(tmp_path / "t.tar", members(range(36, 48), "text"))
    broken = [("99.jpg", picture(99)[:-300]), ("99.txt", b"a cat")]
    write_tar(tmp_path / "b.tar", [*members(range(50, 53)), *broken])
    return [{"shards": str(tmp_path / f"{name}.tar")} for name in "pitb"]


def settings(tmp_path, mixed, **sections) -> Config:
    data = json.loads(json.dumps(TINY))
    data["run"] = {"dir": str(tmp_path / "run")}
    data["data"] |= {"train": mixed, "val": mixed, "workers": 0, "cache_dir": str(tmp_path / "cache")}
    for name, values in sections.items():
        data[name] = (data.get(name) or {}) | values
    return parse(Config, data, "test")


def run(monkeypatch, config: Config, **recorder) -> tuple[Recorder, Trainer]:
    made = []

    def build(*args):
        made.append(Recorder(build_engine(*args), **recorder))
        return made[-1]

    monkeypatch.setattr(run_module, "build_engine", build)
    trainers, real = [], run_module.set_up
    monkeypatch.setattr(run_module, "set_up", lambda *args: trainers.append(real(*args)) or trainers[-1])
    with joined_program() as session:
        pre_train(config, session, make_probe=knn_probe)
    monkeypatch.setattr(run_module, "set_up", real)
    return made[-1], trainers[-1]


def lines(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def test_the_training_loop_passes_learning_rates_and_counts_to_the_engine(monkeypatch, tmp_path, mixed, caplog):
    """With 52 samples in batches of 26, an epoch has two steps. The warm-up takes two epochs."""
    config = settings(
        tmp_path,
        mixed,
        optim={"peak_lr": 2.56, "end_lr": 0.128, "warmup_epochs": 2},
        train={"global_batch": 26, "micro_batch": 13, "steps": 8, "eval_samples": 52},
    )
    engine, finished = run(monkeypatch, config)
    scale = 26 / 256
    by_hand = [0.0, 0.64, 1.28, 1.92]  # the warm-up has four steps
    by_hand += [0.128 + (2.56 - 0.128) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert engine.lrs == pytest.approx([lr * scale for lr in by_hand])
    logged = [line for line in lines(config) if "loss" in line]
    assert [line["lr"] for line in logged] == engine.lrs
    assert [line["epoch"] for line in logged] == [step / 2 for step in range(1, 9)]

    images = [sum(len(batch.images) for batch in batches) for batches in engine.batches]
    captions = [sum(batch.captions for batch in batches) for batches in engine.batches]
    assert [len(batches) for batches in engine.batches] == [2] * 8
    assert engine.counts == [LossCounts(*pair) for pair in zip(images, captions)]
    # the two micro-batches of a step have different counts
    assert any(len(a.images) != len(b.images) for a, b in engine.batches)
    assert sum(images[:2]) == 24 + 12 + 3 and sum(captions[:2]) == 24 + 12 + 3

    skipped = sum(len(batch.skipped) for batches in engine.batches for batch in batches)
    assert skipped == 4 == logged[-1]["skipped"] == finished.bad.bad
    assert finished.bad.seen == 8 * 26
    assert sum(line.startswith(f"skipped {tmp_path}/b.tar/99: ") for line in caplog.messages) == skipped
    waits = [line["data_wait"] for line in logged]
    assert all(0 <= wait <= 1 for wait in waits) and len(set(waits)) > 1


def test_a_run_reads_the_samples_that_its_config_selects(monkeypatch, tmp_path, mixed):
    monkeypatch.setattr(run_module, "build_engine", lambda *_: SimpleNamespace())
    found = []
    for seed in (1, 1, 2):
        config = settings(
            tmp_path,
            mixed[:1],
            run={"seed": seed},
            data={"repeats": 2, "val": [{"shards": write_tar(tmp_path / "v.tar", members(range(60, 70)))}]},
            train={"global_batch": 6, "micro_batch": 6, "steps": None, "epochs": 1.5, "eval_samples": 5},
        )
        with joined_program() as session:
            made = run_module.set_up(config, "no", session, None)
        assert made.schedule.total_steps == len(made.train_loader) == 1.5 * 2 * 24 / 6
        assert all(key.startswith(f"{tmp_path}/p.tar/") for key in next(iter(made.train_loader)).keys)
        (batch,) = made.task.eval_loader
        assert batch.keys == [f"{tmp_path}/v.tar/{number:05d}" for number in range(60, 70, 2)]
        found.append(batch.encoder_table_ids.tolist())
    assert found[0] == found[1] != found[2]  # masks depend on the seed


def test_a_run_stops_if_the_fraction_of_bad_samples_is_too_high(monkeypatch, tmp_path):
    """One of five samples is bad. Bad samples are included in the number of all samples."""
    files = [*members(range(8)), *((f"9{i}.jpg", b"") for i in range(2))]
    path = write_tar(tmp_path / "a.tar", files)
    options = {"model": {"vocab_size": 0}, "train": {"global_batch": 10, "micro_batch": 10, "steps": 3}}
    source = [{"shards": path, "modality": "image"}]
    for fraction in (0.2, 0.19):
        changed = {"data": {"max_bad_fraction": fraction, "val": []}, "run": {"dir": str(tmp_path / str(fraction))}}
        config = settings(tmp_path, source, **options | changed)
        if fraction == 0.2:
            run(monkeypatch, config)
        else:
            with pytest.raises(UserError, match="2 of 10 samples cannot be used"):
                run(monkeypatch, config)


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_non_finite_loss_ends_training(monkeypatch, tmp_path, mixed, loss):
    train = {"global_batch": 26, "micro_batch": 26, "steps": 8, "eval_every": 2}
    config = settings(tmp_path, mixed, train=train)
    with pytest.raises(UserError, match="the loss of step 2 is not finite; samples: "):
        run(monkeypatch, config, bad={2: loss})
    assert [line["step"] for line in lines(config) if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines(config) if "val_image_loss" in line] == [0]


@pytest.mark.parametrize("loss", [None, math.inf, math.nan])
def test_an_evaluation_marks_a_checkpoint_as_good_only_if_its_losses_are_finite(monkeypatch, tmp_path, mixed, loss):
    config = settings(tmp_path, mixed, train={"global_batch": 26, "micro_batch": 26, "steps": 1})
    run(monkeypatch, config, held_out=loss)
    (saved,) = checkpoint.saved_steps(config.run.dir)
    assert checkpoint.is_good(saved) == (loss is None)


def test_a_resumed_run_keeps_the_attention_kernels_of_its_checkpoint(monkeypatch, tmp_path, mixed):
    train = {"global_batch": 4, "micro_batch": 4, "steps": 1}
    config = settings(tmp_path, mixed[:1], data={"val": []}, train=train)
    run(monkeypatch, config)
    (saved,) = checkpoint.saved_steps(config.run.dir)
    info = json.loads((saved / checkpoint.INFO_FILE).read_text())
    (saved / checkpoint.INFO_FILE).write_text(json.dumps(info | {"attention": {"encoder": "flash"}}))
    with joined_program() as session:
        assert run_module.set_up(config, "auto", session, None).task.attention == {"encoder": "flash"}


def test_an_evaluation_that_computes_no_loss_does_not_mark_the_checkpoint_as_good(monkeypatch, tmp_path, mixed):
    """There is no loss, because no held-out sample can be used."""
    broken = write_tar(tmp_path / "v.tar", [("0.jpg", picture(0)[:-300]), ("0.txt", b"a cat")])
    train = {"global_batch": 26, "micro_batch": 26, "steps": 1}
    config = settings(tmp_path, mixed, data={"val": [{"shards": str(broken)}]}, train=train)
    run(monkeypatch, config)
    (saved,) = checkpoint.saved_steps(config.run.dir)
    assert [line["val_skipped"] for line in lines(config) if "val_skipped" in line] == [1, 1]
    assert not checkpoint.is_good(saved)


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_an_engine_trains_with_stochastic_depth_and_evaluates_without(kind):
    data = json.loads(json.dumps(TINY)) | {"deepspeed": None if kind == "torch" else {}}
    data["model"] |= {"drop_path": 0.5}
    data["train"] |= {"global_batch": 2, "micro_batch": 2}
    config = parse(Config, data, "test")
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model = M3AE(config.model, config.loss)
        batch = pack([paired(config, seed) for seed in range(2)], model.geometry)
        engine = build_engine(model, config, ranks)
        evaluated = [engine.evaluate(batch).loss.item() for _ in range(2)]
        trained = [engine.step([batch], batch.counts, 0.0)[0][0].loss.item() for _ in range(2)]
        again = engine.evaluate(batch).loss.item()
        last = engine.step([batch], batch.counts, 0.0)[0][0].loss.item()
    assert evaluated[0] == evaluated[1] == again
    assert len({evaluated[0], *trained, last}) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_multiplies_in_its_precision_in_both_modes(precision):
    """Hooks record the output dtype of every linear layer, the mode and whether gradients are computed."""
    data = json.loads(json.dumps(TINY))
    data["train"] |= {"global_batch": 2, "micro_batch": 2, "precision": precision}
    config = parse(Config, data, "test")
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model = M3AE(config.model, config.loss)
        batch = pack([paired(config, seed) for seed in range(2)], model.geometry)
        engine, seen = build_engine(model, config, ranks), set()

        def see(layer, _, out):
            for part in filter(torch.is_tensor, out if isinstance(out, tuple) else (out,)):
                seen.add((part.dtype, layer.training, torch.is_grad_enabled()))

        for layer in (module for module in engine.model.modules() if isinstance(module, torch.nn.Linear)):
            layer.register_forward_hook(see)
        expected = torch.bfloat16 if precision == "bf16" else torch.float32
        for training, work in (
            (False, lambda: engine.evaluate(batch)),
            (True, lambda: engine.step([batch], batch.counts, 0.0)),
            (False, lambda: engine.evaluate(batch)),
        ):
            seen.clear()
            work()
            assert seen == {(expected, training, training)}


def paired(config: Config, seed: int):
    c, generator = config.model, torch.Generator().manual_seed(seed)
    sample = make_sample(seed, image=False)
    sample.image = torch.randint(0, 256, (3, c.image_size, c.image_size), dtype=torch.uint8, generator=generator)
    sample.image_mask = torch.arange(c.patches_per_image) % 4 > 0
    return sample


def test_a_state_being_written_does_not_change_while_training_continues():
    data = json.loads(json.dumps(TINY))
    data["train"] |= {"global_batch": 2, "micro_batch": 2, "ema": 0.5}
    config = parse(Config, data, "test")
    with join_ranks() as ranks:
        model = M3AE(config.model, config.loss)
        batch = pack([paired(config, seed) for seed in range(2)], model.geometry)
        engine = build_engine(model, config, ranks)
        engine.step([batch], batch.counts, 0.1)
        staging = Staging()
        staged = staging.copy(engine.fragments)
        before = {name: piece.data.clone() for name, piece in staged.items()}
        engine.step([batch], batch.counts, 0.1)
        assert all(torch.equal(piece.data, before[name]) for name, piece in staged.items())
        after = staging.copy(engine.fragments)
    assert any(not torch.equal(piece.data, before[name]) for name, piece in after.items())


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_applies_to_encoder_and_decoder(on):
    data = json.loads(json.dumps(TINY))
    data["train"] |= {"activation_checkpointing": on}
    config = parse(Config, data, "test")
    with join_ranks() as ranks:
        model = build_engine(M3AE(config.model, config.loss), config, ranks).model
    assert (model.encoder.checkpointing, model.decoder.checkpointing) == (on, on)


@pytest.mark.parametrize("most", [None, 0.01, 1.0, 1e9])
def test_gradients_are_clipped_as_in_torch(most):
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(3, n)) for n in (1, 5)] for _ in range(2))
    for one, other in zip(ours, theirs):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, math.inf if most is None else most)
    assert clip_by_global_norm(ours, most) == pytest.approx(norm.item())
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=0)


def test_data_wait_measures_only_the_wait_for_the_loader(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(feed_module.time, "perf_counter", lambda: clock[0])

    def batches():
        for number in range(4):
            clock[0] += 1
            yield number

    def start_sums(host):
        clock[0] += 10
        return lambda: host

    steps = []
    for step in feed_module.feed(batches(), 2, torch.device("cpu"), start_sums):
        steps.append((step.host, step.waited))
        clock[0] += 100
    assert steps == [([0, 1], 2.0), ([2, 3], 2.0)]


class OneOfTwo:
    """One of two ranks. The sums of the other rank are `other`."""

    device = torch.device("cpu")

    def __init__(self, other=None):
        self.other, self.own = other, None

    def sum(self, values):
        if len(values) == 1:  # the only value is whether a rank is asked to stop
            return list(values)
        self.own = list(values)
        return [a + b for a, b in zip(values, self.other)] if self.other else list(values)


def unchanged(batch):
    return batch


def test_held_out_losses_are_means_over_the_images_and_captions_of_all_ranks():
    torch.manual_seed(0)
    model = M3AE(SMALL)
    engine = argparse.Namespace(evaluate=lambda batch: model.eval()(batch))
    samples = [*MIXED, make_sample(7, image=False, words=3), make_sample(8, words=2), make_sample(9, words=None)]
    with torch.no_grad():
        model.text_head.bias[5] = 30.0  # the model always predicts 5, which is correct for some captions
    samples[4] = dataclasses.replace(samples[4], tokens=torch.full_like(samples[4].tokens, 5))
    samples[6] = dataclasses.replace(
        samples[6], tokens=torch.tensor([5, 5, 1]), text_mask=torch.ones(3, dtype=torch.bool)
    )
    parts = [pack(samples[:2], model.geometry), pack(samples[2:5], model.geometry)], [pack(samples[5:], model.geometry)]
    bad = [Skipped("a.tar", key, "broken") for key in "12"]
    parts[0][1] = dataclasses.replace(parts[0][1], skipped=bad)
    parts[1][0] = dataclasses.replace(parts[1][0], skipped=bad[:1])
    second = OneOfTwo()
    assert evaluate(engine, parts[1], second, unchanged)["val_skipped"] == 1
    values = evaluate(engine, parts[0], OneOfTwo(second.own), unchanged)
    with torch.no_grad():
        alone = [model(pack([sample], model.geometry)) for sample in samples]
    assert values["val_skipped"] == 3 and "val_skipped" not in evaluate(engine, parts[0][:1], OneOfTwo(), unchanged)
    assert 0 < values["val_text_accuracy"] < 1
    images = [one.image_loss.item() for one, sample in zip(alone, samples) if sample.image is not None]
    texts = [(one.text_loss.item(), one.text_accuracy.item()) for one, s in zip(alone, samples) if s.tokens is not None]
    assert values["val_image_loss"] == pytest.approx(sum(images) / len(images), rel=1e-5)
    assert values["val_text_loss"] == pytest.approx(sum(loss for loss, _ in texts) / len(texts), rel=1e-5)
    assert values["val_text_accuracy"] == pytest.approx(sum(right for _, right in texts) / len(texts), rel=1e-5)


def test_work_ends_before_the_next_batch_if_any_rank_requests_a_stop():
    ranks, stop, done = OneOfTwo(), argparse.Namespace(requested=False), []
    with pytest.raises(Stopped):
        for batch in until_stopped(range(5), ranks, stop):
            done.append(batch)
            stop.requested = batch == 2
    assert done == [0, 1, 2]
    other = argparse.Namespace(sum=lambda values: [values[0] + 1])  # the other rank asks to stop
    with pytest.raises(Stopped):
        next(until_stopped(range(5), other, argparse.Namespace(requested=False)))


@pytest.mark.parametrize("repeat_shapes", [False, True])
def test_a_step_counts_its_samples_without_padding(repeat_shapes):
    batches = [
        pack(samples, M3AE(SMALL).geometry, repeat_shapes=repeat_shapes) for samples in (MIXED[:2], MIXED[2:], [])
    ]
    counts = StepCounts.of(batches, SMALL)
    images, texts = (sum(getattr(sample, name) is not None for sample in MIXED) for name in ("image", "tokens"))
    words = sum(len(sample.tokens) for sample in MIXED if sample.tokens is not None)
    tokens = len(MIXED) + SMALL.patches_per_image * images + words
    assert counts[:-1] == (len(MIXED), images, texts, images, texts, 0, tokens, images)
    shared = [dataclasses.replace(sample, same_image=i == 1) for i, sample in enumerate([MIXED[0], MIXED[0]])]
    counts = StepCounts.of([pack(shared, M3AE(SMALL).geometry)], SMALL)
    assert (counts.samples, counts.images, counts.crops) == (2, 2, 1)


def test_flops_counted_by_a_worker_are_not_counted_again(monkeypatch):
    """Counting the FLOPs of a step takes milliseconds, in which a GPU would wait."""
    model = M3AE(SMALL)
    batch = collate(MIXED, model.geometry, SMALL)
    assert batch.flops == executed_flops(SMALL, batch) > 0 and collate(MIXED, model.geometry).flops is None
    expected = StepCounts.of([replace(batch, flops=None)], SMALL)
    there = pickle.loads(pickle.dumps(batch)).to("cpu")
    monkeypatch.setattr(throughput, "executed_flops", lambda *_: pytest.fail("counted again"))
    assert StepCounts.of([there], SMALL) == expected


def test_the_loader_workers_of_a_run_count_flops():
    data = argparse.Namespace(tokenizer=None, image_tokenizer=None)
    config = parse(
        Config,
        {"model": SMALL.model_dump(), "data": {"train": [{"shards": "none.tar"}]}, "train": {"steps": 1}},
        "case",
    )
    assert preparation_of(config, M3AE(SMALL), data).counted_for == config.model


def test_modules_are_set_to_training_mode_only_after_an_evaluation(monkeypatch):
    config = parse(
        Config,
        {
            "model": SMALL.model_dump(),
            "data": {"train": [{"shards": "none.tar"}]},
            "train": {"steps": 1, "precision": "fp32"},
            "deepspeed": None,
        },
        "case",
    )
    with join_ranks() as ranks:
        engine = build_engine(M3AE(config.model), config, ranks)
        batch, modes = pack(MIXED, engine.model.geometry), []
        train = type(engine.model).train
        monkeypatch.setattr(type(engine.model), "train", lambda self, *mode: modes.append(mode) or train(self, *mode))
        for _ in range(2):
            engine.step([batch], batch.counts, 1e-3)
        assert modes == []
        engine.evaluate(batch)
        assert modes == [(False,)] and not engine.model.training
        engine.step([batch], batch.counts, 1e-3)
        assert modes == [(False,), ()] and engine.model.encoder.training


def test_the_first_non_finite_step_is_reported_with_the_non_finite_quantity():
    """A step has two micro-batches. Their losses are known before the norm of the gradients, so a loss is reported
    first."""
    fine, wrong = torch.tensor(1.0), torch.tensor(math.nan)
    for place, what in ((0, "loss"), (1, "loss"), (2, "gradient norm")):
        watch = LossWatch()
        for step in range(1, 6):
            values = [wrong if (step, i) == (3, place) or step == 5 else fine for i in range(3)]
            losses = [argparse.Namespace(loss=value) for value in values[:2]]
            watch.add(step, [f"{step}-{number}" for number in range(9 if place else 8)], losses, values[2])
            assert watch.failed() == (step > 2)
        shown = ", ".join(f"3-{number}" for number in range(8)) + (" and 1 more" if place else "")
        assert watch.first_bad() == f"the {what} of step 3 is not finite; samples: {shown}"
        assert (watch.bad_step, watch.finite_through) == (3, 2)


def saver(ranks, folder, log=print) -> Saver:
    """Return the Saver of a run without an engine."""
    return Saver(
        run_dir=folder,
        keep=1,
        engine=SimpleNamespace(),
        ranks=ranks,
        constants={},
        suggested_fix="less",
        log=log,
        keep_folder=lambda: "",
        after_save=lambda step, path: None,
    )


def test_the_earliest_failed_step_of_all_ranks_is_reported():
    """The step fails on the rank that has the bad sample. This rank's gradients are summed with those of the others, so
    that the other ranks fail one step later."""
    judged = []
    for mine, other in ((7, 8), (8, 7), (7, None), (None, 7)):
        trainer = argparse.Namespace(
            watch=argparse.Namespace(first_bad=partial("step {}".format, mine), bad_step=mine, finite_through=6),
            ranks=RankWithPartner(value=(f"step {other}", other, 6)),
            saver=argparse.Namespace(
                awaits=lambda step: False, step_was_not_finite=lambda step: judged.append(step) or "told"
            ),
            suggested_fix="less",
        )
        with pytest.raises(UserError, match=r"step 7\. told; look at these samples, or continue with less"):
            Trainer.stop_if_diverged(trainer)
    assert judged == [7] * 4


def test_throughput_is_measured_since_the_previous_log_line(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    config, masking = SMALL, MaskingConfig()
    meter = Throughput(config, masking, peak_flops=1e9)
    counts = StepCounts(
        samples=10, images=8, captions=5, loss_image=8, loss_text=5, skipped=1, tokens=300, crops=8, flops=4e9
    )
    meter.add(counts, waited=0.5)
    meter.add(counts, waited=0.5)
    clock[0] = 104.0
    rates = meter.rates()
    flops = 2 * sum(
        count * reference_flops(config, masking, image=image, text=text)
        for count, image, text in ((3, True, True), (5, True, False), (2, False, True))
    )
    assert rates == pytest.approx(
        {"samples_per_s": 5, "tokens_per_s": 150, "utilisation": 2, "data_wait": 0.25, "mfu": flops / 4 / 1e9}
    )
    meter.add(counts, waited=0)
    clock[0] = 105.0
    assert meter.rates()["samples_per_s"] == 10


@pytest.mark.parametrize(
    ("model", "masking"),
    [({"dec_attention": "cross"}, {}), ({}, {"image_predicted": 0.5}), ({}, {"text_predicted": 0.5})],
)
def test_mfu_is_not_logged_if_the_run_does_not_compute_what_the_official_code_computes(model, masking):
    meter = Throughput(SMALL.model_copy(update=model), MaskingConfig(**masking), peak_flops=1e9)
    assert "mfu" not in meter.rates()


def test_utilisation_includes_newton_schulz_iterations(monkeypatch):
    """With data parallelism, each rank orthogonalises all matrices; from ZeRO stage 1 on, only its part of them."""
    given = {"train": TINY["train"] | {"global_batch": 8}}
    muon = given | {"optim": TINY["optim"] | {"name": "muon"}}
    sections = (given, muon, muon | {"deepspeed": {"zero_optimization": {"stage": 1}}})
    configs = [parse(Config, TINY | {"deepspeed": None} | section, "test") for section in sections]
    model = M3AE(configs[0].model)
    whole = orthogonalisation_flops(model.hidden_matrices())
    assert [newton_schulz_flops(config, model, 4) for config in configs] == [0, whole, whole / 4]
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    meter = Throughput(SMALL, MaskingConfig(), peak_flops=1e9, update_flops=3e9)
    for steps in (2, 1):  # number of steps between two log lines
        for _ in range(steps):
            meter.add(StepCounts(*[0] * 8, flops=1e9), waited=0)
        clock[0] += 2
        assert meter.rates()["utilisation"] == 2 * steps


@pytest.mark.parametrize(("name", "zero"), [("adamw", {}), ("muon", {}), ("muon", {"stage": 1})])
def test_utilisation_is_relative_to_the_peak_throughput_of_all_ranks(monkeypatch, tmp_path, mixed, name, zero):
    """The rank is either the only one, or it is told that there are two ranks although only one runs. Without ZeRO,
    each rank orthogonalises all matrices."""
    monkeypatch.setattr(run_module, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(run_module, "build_engine", lambda *_: SimpleNamespace())
    sections = {"deepspeed": {"zero_optimization": zero}} if zero else {}
    train = {"global_batch": 26, "micro_batch": 13}
    config = settings(tmp_path, mixed, train=train, optim={"name": name}, **sections)
    with joined_program() as session:
        meters = [
            run_module.set_up(
                config, "no", session._replace(ranks=dataclasses.replace(session.ranks, world=world)), None
            ).throughput
            for world in (1, 2)
        ]
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    spent = []
    for meter in meters:
        meter.rates()
        meter.add(StepCounts(*[0] * 8, flops=8e9), waited=0)
        clock[0] += 2
        spent.append(meter.rates()["utilisation"])
    updates = orthogonalisation_flops(M3AE(config.model).hidden_matrices()) if name == "muon" else 0
    of_two_ranks = updates / (4e9 if zero else 2e9)
    assert spent == pytest.approx([4 + updates / 2e9, 2 + of_two_ranks], rel=1e-6)


class RankWithPartner(OneOfTwo):
    """One of two ranks, with the given sums and values of its partner."""

    rank, world, is_main = 0, 2, True

    def __init__(self, sums=None, value=None):
        super().__init__(sums)
        self.value = value

    def start_sum(self, values):
        total = self.sum(values)
        return lambda: total

    def gather(self, value):
        return [value, self.value]

    def agreement(self, leaving):
        return None

    def together(self, work):
        return work()

    def on_main(self, work):
        return work()


def _verdict(tmp_path, finite_through, busy=(False, False)):
    """Return whether two ranks mark the checkpoint of step 4 as good before the next step, and before an evaluation.
    `finite_through`: last step of each rank whose loss is known to be finite; `busy`: whether each rank still writes
    its part of the checkpoint."""
    found = []
    for way in ("next", "evaluation"):
        folder = tmp_path / f"{way} {finite_through} {busy}"
        save(folder, {"model/a": torch.zeros(1)}, checkpoint.Info(4, 64, 0, {}, {}), keep=1)
        trainers = []
        for through, at_work in zip(finite_through, busy):
            trainer = argparse.Namespace(
                stop=argparse.Namespace(requested=False),
                watch=argparse.Namespace(
                    failed=lambda: False,
                    first_bad=lambda: "",
                    bad_step=None,
                    finite_through=through,
                ),
                limit=None,
                bad=argparse.Namespace(count=lambda *_: None),
                throughput=argparse.Namespace(add=lambda *_: None),
                task=argparse.Namespace(count=lambda batches: SampleCounts(0, 0)),
                ranks=RankWithPartner(value=("", None, finite_through[1])),
                heartbeats=argparse.Namespace(watch=lambda loader, doing: [SimpleNamespace()]),
                share=argparse.Namespace(accumulation=1),
                train_loader=None,
                step=4,
                schedule=argparse.Namespace(total_steps=9),
            )
            trainer.saver, work = saver(trainer.ranks, folder), threading.Event()
            trainer.saver.unjudged = 4
            if at_work:
                trainer.saver._thread.start(work.wait)
            trainer._start_sums = partial(Trainer._start_sums, trainer)
            trainer._decide, trainer._change = lambda: 0, lambda total: None
            trainers.append((trainer, work))
        (main, working), (other, others) = trainers
        if way == "next":
            other._start_sums([])()
            main.ranks.other = other.ranks.own
            next(Trainer.inputs(main))
        else:
            working.set()  # ends the write, for which stop_if_diverged waits
            Trainer.stop_if_diverged(main)
        good = checkpoint.is_good(*checkpoint.saved_steps(folder))
        assert (main.saver.unjudged is None) == good
        found.append(good)
        working.set(), others.set()
    return found


def test_a_checkpoint_is_marked_good_once_the_next_step_is_finite_on_all_ranks(tmp_path):
    """Step 5 is the first step whose loss is computed from the weights after step 4."""
    for pair in itertools.product((3, 4, 5, 6), repeat=2):
        assert _verdict(tmp_path, pair) == [min(pair) >= 5] * 2, pair
    assert _verdict(tmp_path, (5, 5), busy=(False, True)) == [False, True]  # the checkpoint may not be written yet


def test_the_peak_of_a_matmul_counts_a_multiplication_and_an_addition(monkeypatch):
    from m3ae_fast.base import hardware

    clock = iter(range(1000))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))  # every matmul takes one second
    sizes, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append((*a.shape, b.shape[1])) or real(a, b))
    peak = hardware.peak_flops(torch.device("cpu"), torch.float32)
    assert peak == 2 * math.prod(sizes[-1])


def test_an_epoch_with_less_than_a_batch_has_one_step():
    config = parse(Config, TINY, "test")
    schedule = Schedule(config.train, config.optim.model_copy(update={"warmup_epochs": 1000.0}), samples=5)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.warmup_steps) == (1, 6, 6)


def test_an_epoch_consists_of_whole_batches():
    config = parse(Config, TINY, "test")
    batch = config.train.global_batch
    found = [Schedule(config.train, config.optim, samples).steps_per_epoch for samples in (batch, 3 * batch - 1)]
    assert found == [1, 2]
    for epochs, samples, steps in ((0.29, 100 * batch, 29), (1.75, batch, 2), (1.25, batch, 1), (0.1, batch, 1)):
        train = config.train.model_copy(update={"steps": None, "epochs": epochs})
        assert Schedule(train, config.optim, samples).total_steps == steps


@pytest.mark.parametrize(
    ("optim", "batch", "scaled", "words"),
    [
        (OptimConfig(peak_lr=1e-3), 56, True, "learning rate 0.000219 = optim.peak_lr 0.001 x batch 56 / 256"),
        (OptimConfig(peak_lr=1.5e-4), 4096, True, "learning rate 0.0024 = optim.peak_lr 0.00015 x batch 4,096 / 256"),
        (OptimConfig(peak_lr=1e-3), 256, True, "learning rate 0.001"),
        (OptimConfig(peak_lr=1e-3), 1024, False, "learning rate 0.001"),
    ],
)
def test_the_learning_rate_is_printed_as_logged_and_as_configured(optim, batch, scaled, words):
    schedule = Schedule(TrainConfig(steps=10, global_batch=batch), optim, 100, scaled=scaled)
    assert schedule.describe_rate() == words
    assert f"{schedule.lr(schedule.warmup_steps):.3g}" == words.split()[2]


def test_the_learning_rate_stays_constant_after_the_end_of_the_schedule():
    config = parse(Config, TINY, "test")
    optim = config.optim.model_copy(update={"warmup_epochs": 1.0, "end_lr": 0.01, "peak_lr": 1.0})
    schedule = Schedule(config.train, optim, samples=5)
    last = schedule.lr(schedule.total_steps)
    assert last == pytest.approx(0.01 * schedule.lr_factor)
    assert [schedule.lr(schedule.total_steps + more) for more in (1, 2, 5, 9)] == [last] * 4


def test_only_unusual_settings_are_reported(tmp_path, mixed):
    wild = settings(tmp_path, mixed, optim={"warmup_epochs": 1000.0})
    calm = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})

    def notes(config: Config) -> list[str]:
        data = replace(open_data(config.data, config.model), val=None)
        return run_warnings(config, data, Schedule(config.train, config.optim, data.train.samples))

    warmup, colours = notes(wild)
    assert "the warm-up of 3,000 steps (optim.warmup_epochs=1000) is shortened to the run's 6 steps" in warmup
    assert "model.image_std are still the defaults for CC12M" in colours and "m3ae-fast shards stats" in colours
    assert notes(calm) == []
    large = calm.model_copy(update={"train": calm.train.model_copy(update={"global_batch": 100})})
    (batch,) = notes(large)
    assert batch.startswith(
        "a batch of 100 contains each of the 52 samples 1.9 times on average; an epoch therefore counts"
    )


@pytest.mark.parametrize(
    "model, masking, named",
    [
        ({}, {"image_predicted": 0.33}, "masking.image_predicted=0.33"),
        ({}, HALF_PREDICTED, "masking.image_predicted=0.5 and masking.text_predicted=0.5"),
        ({"vocab_size": 0}, {"text_predicted": 0.5}, None),
        ({"dec_attention": "cross"}, HALF_PREDICTED, None),
    ],
)
def test_partial_prediction_with_self_attention_is_reported(tmp_path, mixed, model, masking, named):
    """Without captions, the fraction of the text tokens has no effect."""
    captioned = settings(tmp_path, mixed)
    data = replace(open_data(captioned.data, captioned.model), val=None)
    config = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3} | model, masking=masking)
    found = run_warnings(config, data, Schedule(config.train, config.optim, data.train.samples))
    assert [note.partition(", the features became worse")[0] for note in found] == (
        [f"with model.dec_attention=self and {named}"] if named else []
    )


@pytest.mark.parametrize(
    "loss, masking, trained",
    [
        ({"image_weight": 0, "text_weight": 0}, {}, False),
        ({}, {"image_ratio": 0, "text_ratio": 0}, False),
        ({"text_weight": 0}, {"image_ratio": 0}, False),
        ({"text_weight": 0, "image_all_tokens": True}, {"image_ratio": 0}, True),
        ({}, {"image_ratio": 0}, True),
    ],
)
def test_a_run_without_a_trainable_loss_is_reported(tmp_path, mixed, loss, masking, trained):
    config = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})
    changes = {"loss": config.loss.model_copy(update=loss), "masking": config.masking.model_copy(update=masking)}
    config = config.model_copy(update=changes)
    data = replace(open_data(config.data, config.model), val=None)
    found = run_warnings(config, data, Schedule(config.train, config.optim, data.train.samples))
    assert [note.startswith("the total loss is always 0: ") for note in found] == [True] * (not trained)


def test_enlarged_images_are_reported(tmp_path, mixed):
    """The images of `mixed` have 40 x 30 pixels."""
    for size, is_noted in ((40, False), (48, True)):
        config = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3, "image_size": size})
        data = replace(open_data(config.data, config.model), val=None)
        notes = run_warnings(config, data, Schedule(config.train, config.optim, data.train.samples))
        assert [note.startswith("images are enlarged: half of ") for note in notes] == [True] * is_noted
        assert all("short side of 30 pixels or less, but model.image_size is 48" in note for note in notes)
    native = config.model_copy(update={"model": config.model.model_copy(update={"resize": "native"})})
    # native images keep their size
    assert run_warnings(native, data, Schedule(config.train, config.optim, data.train.samples)) == []


def test_an_image_only_run_logs_no_text_metrics(monkeypatch, tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(8), "image"))
    train = {"global_batch": 8, "micro_batch": 8, "steps": 2, "log_every": 1}
    config = settings(tmp_path, [{"shards": path}], model={"vocab_size": 0}, train=train)
    run(monkeypatch, config)
    names = {name for line in lines(config) for name in line}
    assert {"image_loss", "val_image_loss", "val_image_relative", "val_rankme"} <= names
    assert not any("text" in name for name in names)


def test_ignored_files_in_shards_are_reported_at_the_start(tmp_path, mixed):
    config = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})
    films = write_tar(tmp_path / "films.tar", [("0.jpg", picture(0)), ("0.mp4", b"film")])
    found = [open_corpus([SourceConfig(shards=s)], ShardStore(tmp_path)) for s in (mixed[0]["shards"], films)]
    whole, other = found
    schedule = Schedule(config.train, config.optim, 100)
    for data, name in ((Data(other, whole, None), "train"), (Data(whole, other, None), "val")):
        assert run_warnings(config, data, schedule) == [f"data.{name}: some files in the shards are ignored: 1 .mp4"]


def test_images_whose_captions_are_not_adjacent_are_reported(tmp_path, mixed):
    config = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})
    images, captions = ([(f"{i}.{suffix}", data) for i, data in enumerate(files)] for suffix, files in (
        ("jpg", [picture(i) for i in range(3)]), ("txt", [b"a", b"b"])
    ))  # fmt: skip
    tars = [
        ("apart", [*images, *captions]),
        ("sorted", sorted([*images, *captions])),
        ("other", [*images[:2], ("x.txt", b"x")]),
    ]
    found = {}
    for name, files in tars:
        path = write_tar(tmp_path / f"{name}.tar", files)
        corpus = open_corpus([SourceConfig(shards=path)], ShardStore(tmp_path))
        found[name] = run_warnings(config, Data(corpus, None, None), Schedule(config.train, config.optim, 128))
    assert found.pop("apart")[0].startswith(
        f"data.train: 2 images and their captions are separate samples, because their files are not adjacent in the "
        f"tar (for example, in {tmp_path / 'apart.tar'}); create the tar again"
    )
    assert not any("adjacent" in note for notes in found.values() for note in notes)


def test_held_out_shards_that_are_also_used_for_training_are_reported(tmp_path, mixed):
    one, two = (write_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", picture(i))]) for i in range(2))
    calm = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})
    train, val = (open_corpus([SourceConfig(shards=names)], ShardStore(tmp_path)) for names in (one, [one, two]))
    (note,) = run_warnings(calm, Data(train, val, None), Schedule(calm.train, calm.optim, 100))
    assert note.startswith(f"data.val: 1 of its shards is also used for training (for example, {one}), so")


def test_a_cache_on_a_network_file_system_is_reported(tmp_path, mixed, monkeypatch):
    """The note is given only if shards are copied into the cache."""
    calm = settings(tmp_path, mixed, model={"image_mean": [0.5] * 3})
    path = write_tar(tmp_path / "one.tar", [("0.jpg", picture(0))])
    store, schedule = ShardStore(tmp_path / "cache"), Schedule(calm.train, calm.optim, 100)
    far, near = (Data(open_corpus([SourceConfig(shards=s)], store), None, None) for s in (f"pipe:cat {path}", path))
    assert run_warnings(calm, far, schedule) == []
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    (note,) = run_warnings(calm, far, schedule)
    assert f"data.cache_dir {store.cache_dir} is on a network file system (nfs4)" in note
    assert run_warnings(calm, near, schedule) == []


def test_continuously_growing_memory_is_reported():
    growth = MemoryGrowth()
    assert [growth.check(step, gigabytes) for step, gigabytes in ((1, 1.0), (50, 2.0), (60, 2.9))] == [None] * 3
    assert growth.check(70, 3.1) == "peak memory has grown from 2.00 to 3.10 GB"
    assert growth.check(80, 3.2) is None
