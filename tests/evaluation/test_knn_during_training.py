import json
import os
import signal
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.evaluation import knn_during_training
from m3ae_fast.heads import encoding, knn
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.stoppable_loop import Stopped
from m3ae_fast.train import main
from m3ae_fast.weights.open_model import open_model
from tests.evaluation.conftest import settings
from tests.helpers.labelled import NAMES, coloured
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow


def probe(shards, **more):
    train, val = ([{"shards": shard, "modality": "image"}] for shard in shards)
    return settings(f"train.probe={json.dumps({'train': train, 'val': val, 'every': 2, **more})}")


@pytest.fixture
def pretrain(trainer, shards):
    """Return a function of a name and options that trains for three steps and returns the logged metrics."""

    def run(name, *options):
        folder = trainer.folder / name
        fixed = settings(f"run.dir={folder}", "train.steps=3", "data.workers=0", "train.eval_samples=8")
        assert main(["--config", str(trainer.config), *fixed, *options]) == 0
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_run_logs_the_k_nn_accuracy_and_its_losses_are_unchanged(pretrain, shards, trainer, monkeypatch):
    given, real = [], knn.knn_scores
    monkeypatch.setattr(knn, "knn_scores", lambda *args: given.append(args) or real(*args))
    plain = pretrain("plain")
    probed = pretrain("probed", *probe(shards, k=3, temperature=0.5))
    *_, (bank, found, classes, k, temperature) = given
    labels, queries = bank.labels, found.features_RD
    model = open_model(str(trainer.folder / "probed"), text=False)
    images = [decode_image(coloured(number, NAMES[number % 3]), 3) for number in range(100, 118)]
    torch.testing.assert_close(queries, model.encode(images, precision="fp32"), rtol=1e-4, atol=1e-5)
    assert (len(bank.keys), labels.tolist(), classes, k, temperature) == (48, [i % 3 for i in range(48)], 3, 3, 0.5)
    shown = [(line["step"], line["val_knn_top1"]) for line in probed if "val_knn_top1" in line]
    assert [step for step, _ in shown] == [0, 2, 3]
    assert all(0.5 < share <= 1 for _, share in shown)  # by chance, a third of the three colours would be right
    assert {line["val_knn_k"] for line in probed if "val_knn_top1" in line} == {3}
    assert {line["val_knn_largest_class"] for line in probed if "val_knn_top1" in line} == {1 / 3}
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, probed)]
    assert losses[0] == losses[1]


def test_a_stop_request_ends_the_pass_between_two_batches(pretrain, shards, monkeypatch):
    pool, calls = encoding._pool, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the third pass is that of the training samples after step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return pool(*args, **kwargs)

    monkeypatch.setattr(encoding, "_pool", signalled)
    lines = pretrain("stopped", *probe(shards))
    assert len(calls) == 3 and lines[-1]["step"] == 2
    assert [line["step"] for line in lines if "val_knn_top1" in line] == [0]
    monkeypatch.undo()
    whole = pretrain("whole", *probe(shards))
    resumed = pretrain("stopped", *probe(shards), "--resume", "auto")
    assert resumed[-1] == whole[-1] and "val_knn_top1" in whole[-1]


def test_the_probe_encodes_the_mean_of_the_tokens_in_the_precision_of_the_run(monkeypatch):
    """If a stop request ends the encoding, the trainer is told that the pass was cut short."""
    encoded, cut = [], []

    def encode(model, batches, config, *more, **others):
        encoded.append((config.pool, config.precision))
        raise Stopped

    monkeypatch.setattr(knn_during_training, "corpus_batches", lambda model, corpus, *_: corpus)
    monkeypatch.setattr(knn_during_training, "encode_batches", encode)
    trainer = MagicMock(engine=SimpleNamespace(model=object.__new__(M3AE)))
    trainer.cut_short = lambda: cut.append(True)
    for precision in ("bf16", "fp32"):
        config = SimpleNamespace(data=None, train=SimpleNamespace(precision=precision))
        knn_during_training._log(config, SimpleNamespace(every=1), None, None, [0, 1], trainer)
    assert encoded == [("mean", "bf16"), ("mean", "fp32")] and cut == [True, True]


@pytest.mark.parametrize("captioned", ["train", "val"])
def test_a_probe_on_samples_with_captions_is_refused(monkeypatch, captioned):
    probe = SimpleNamespace(train="train", val="val", labels="cls")
    config = SimpleNamespace(data=MagicMock(), train=SimpleNamespace(probe=probe))
    monkeypatch.setattr(knn_during_training, "ShardStore", MagicMock())
    monkeypatch.setattr(
        knn_during_training, "open_corpus", lambda name, *_, **__: SimpleNamespace(has_captions=name == captioned)
    )
    monkeypatch.setattr(knn_during_training, "label_corpus", lambda corpus, *_, **__: (corpus, None))
    with pytest.raises(UserError, match=r"train\.probe: supports only images"):
        knn_during_training.open_probe(config)


def test_the_largest_class_is_that_of_the_held_out_samples(monkeypatch):
    """Samples are encoded only after it is known that the weights are finite."""
    labels = {"train": [0, 0, 0, 1], "val": [0, 1, 1]}
    done, trainer = [], MagicMock(step=7, engine=SimpleNamespace(model=object.__new__(M3AE)))
    trainer.stop_if_diverged = lambda: done.append("checked")

    def encode(model, corpus, *_, **__):
        done.append(corpus)
        return SimpleNamespace(labels=torch.tensor(labels[corpus]))

    def predictions(bank, queries, classes, config):
        assert (len(bank.labels), len(queries.labels), classes) == (4, 3, 2)
        return SimpleNamespace(accuracies=lambda: {"top1": 0.5}, chosen={"k": 20})

    monkeypatch.setattr(knn_during_training, "corpus_batches", lambda model, corpus, *_: corpus)
    monkeypatch.setattr(knn_during_training, "encode_batches", encode)
    monkeypatch.setattr(knn_during_training, "knn_predictions", predictions)
    config = SimpleNamespace(data=None, train=SimpleNamespace(precision="fp32"))
    knn_during_training._log(config, SimpleNamespace(every=1), "train", "val", [0, 1], trainer)
    assert done == ["checked", "train", "val"]
    trainer.log.log.assert_called_once_with(7, {"val_knn_top1": 0.5, "val_knn_k": 20, "val_knn_largest_class": 2 / 3})


def test_invalid_labels_end_the_run_before_training(pretrain, shards, tmp_path):
    with pytest.raises(UserError, match=r"48 of 48 samples have no label .json.other."):
        pretrain("wrong", *probe(shards, labels="json.other"))
    assert not (tmp_path / "wrong").exists()


def test_the_k_nn_curve_of_a_partitioned_model_is_the_same(trainer, shards):
    """With ZeRO-3 on three ranks, every rank takes part in gathering the partitioned weights, even if it has no sample
    left. This occurs for figures of two samples, and in the last batches of the probe."""
    options = [*settings("train.steps=3", "data.workers=0", "train.eval_samples=3", "train.pictures=2")]
    options += [*probe(shards), "--set", "train.eval_every=1"]
    split, curves = {"zero_optimization": {"stage": 3}}, []
    for name, section, ranks in (("plain", None, 1), ("partitioned", split, 3)):
        arguments = trainer.arguments(name, *options, "--set", f"deepspeed={json.dumps(section)}")
        code, out = run_ranks("tests.helpers.split_weights", arguments, ranks, trainer.log(name))
        assert code == 0, out
        lines = map(json.loads, (trainer.folder / name / "metrics.jsonl").read_text().splitlines())
        keys = "loss", "val_knn_top1", "val_image_loss", "val_rankme"
        curves.append([line[key] for line in lines for key in keys if key in line])
        assert (trainer.folder / name / "reconstructions.png").is_file()
    assert len(curves[0]) == 3 + 3 + 2 * 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
