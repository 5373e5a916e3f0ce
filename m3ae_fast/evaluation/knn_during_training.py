"""k-NN accuracy during training: logs the transfer performance of the representation alongside the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, KnnProbeConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus, ShardStore, open_corpus
from m3ae_fast.data.labels import Classes, label_corpus
from m3ae_fast.heads.encoding import PassMonitor, corpus_batches, encode_batches
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.knn import knn_predictions
from m3ae_fast.heads.predictions import largest_share
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.stoppable_loop import Stopped
from m3ae_fast.training.trainer import Trainer

ACCURACY, _K, _LARGEST = "val_knn_top1", "val_knn_k", "val_knn_largest_class"


class Probe(NamedTuple):
    """The labelled samples of `train.probe`."""

    config: KnnProbeConfig
    train: Corpus
    val: Corpus
    classes: Classes

    def describe(self) -> str:
        """Return a description with the numbers of samples and classes."""
        samples = f"{self.val.samples:,} samples, with neighbours from {self.train.samples:,} labelled samples"
        return f"k-NN of {samples}, {len(self.classes):,} classes"


def open_probe(config: Config, *, progress: bool = False) -> Probe | None:
    """Return the labelled samples of `train.probe`; None if it is not set. Raises UserError if shards or labels cannot
    be used."""
    probe, data = config.train.probe, config.data
    if probe is None:
        return None
    store = ShardStore(data.cache_dir, data.cache_gb)
    train, val = (open_corpus(sources, store, progress=progress) for sources in (probe.train, probe.val))
    train, classes = label_corpus(train, probe.labels, progress=progress)
    val, _ = label_corpus(val, probe.labels, classes, progress=progress)
    if train.has_captions or val.has_captions:
        raise UserError('train.probe: supports only images; set "modality": "image" on its sources')
    return Probe(probe, train, val, classes)


def knn_probe(config: Config, ranks: Ranks) -> Callable[[Trainer], None] | None:
    """Open the labelled samples of `train.probe`, and return a function that measures and logs the k-NN accuracy if a
    measurement is due; return None if `train.probe` is not set. Every rank must call the function, which ends early if
    a rank is asked to stop. Raises UserError if shards or labels cannot be used."""
    probe = ranks.main_first(lambda: open_probe(config, progress=ranks.is_main))
    return None if probe is None else partial(_log, config, *probe)


def _log(config: Config, probe: KnnProbeConfig, train: Corpus, val: Corpus, classes: Classes, trainer: Trainer) -> None:
    if not trainer.to_evaluate(probe.every, ACCURACY):
        return
    trainer.stop_if_diverged()
    model = trainer.engine.model
    assert isinstance(model, M3AE)
    encode = EncodeConfig(pool="mean", precision=config.train.precision)
    ranks, heartbeats, stop, folder = trainer.ranks, trainer.heartbeats, trainer.stop, trainer.config.run.dir
    banks: list[FeatureBank] = []
    try:
        for corpus, title in ((train, "k-NN: train"), (val, "k-NN: val")):
            batches = corpus_batches(model, corpus, config.data, encode, ranks)
            monitor = PassMonitor(title, heartbeats, stop)
            banks.append(encode_batches(model, batches, encode, ranks, monitor, folder=folder))
    except Stopped:
        trainer.cut_short()
        return
    bank, queries = banks
    found = knn_predictions(bank, queries, len(classes), probe)
    largest = largest_share(queries.labels.tolist())
    trainer.log.log(trainer.step, {ACCURACY: found.accuracies()["top1"], _K: found.chosen["k"], _LARGEST: largest})
