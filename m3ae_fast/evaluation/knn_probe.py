"""k-NN accuracy while a model trains: shows how the representation transfers, beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, KnnProbeConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus, ShardStore, open_corpus
from m3ae_fast.data.labels import Classes, label_corpus
from m3ae_fast.evaluation.encoding import encode_corpus
from m3ae_fast.evaluation.knn import knn_predictions
from m3ae_fast.evaluation.predictions import largest_share
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.stopping import Stopped
from m3ae_fast.training.run import Run

_NAME, _LARGEST = "val_knn_top1", "val_knn_largest_class"


class Probe(NamedTuple):
    """The labelled samples of `train.probe`."""

    config: KnnProbeConfig
    train: Corpus
    val: Corpus
    classes: Classes

    def describe(self) -> str:
        """Return numbers of samples and classes."""
        samples = f"{self.val.samples:,} samples among {self.train.samples:,}"
        return f"k-NN of {samples} labelled ones, {len(self.classes):,} classes"


def open_probe(config: Config, *, progress: bool = False) -> Probe | None:
    """Open the labelled samples of `train.probe`; None if the config asks for no probe. Raises UserError if shards or
    labels cannot be used."""
    probe, data = config.train.probe, config.data
    if probe is None:
        return None
    store = ShardStore(data.cache_dir, data.cache_gb)
    train, val = (open_corpus(sources, store, progress=progress) for sources in (probe.train, probe.val))
    train, classes = label_corpus(train, probe.labels, progress=progress)
    val, _ = label_corpus(val, probe.labels, classes, progress=progress)
    if train.has_captions or val.has_captions:
        raise UserError('train.probe: takes only images; set "modality": "image" on its sources')
    return Probe(probe, train, val, classes)


def knn_probe(run: Run) -> Callable[[Run], None] | None:
    """Open the labelled samples of `train.probe` before training starts. Return what logs the accuracy where it is due,
    unless a rank is asked to stop, even half-way; every rank must call it. None where the config asks for no probe.
    Raises UserError where shards or labels cannot be used."""
    ranks = run.ranks
    probe = ranks.main_first(lambda: open_probe(run.config, progress=ranks.is_main))
    return None if probe is None else partial(_log, *probe)


def _log(config: KnnProbeConfig, train: Corpus, val: Corpus, classes: Classes, run: Run) -> None:
    if not run.to_evaluate(config.every, _NAME):
        return
    run.stop_if_not_finite()
    model = run.engine.model
    assert isinstance(model, M3AE)
    encode = EncodeConfig(pool=config.pool, precision=run.config.train.precision)
    try:
        bank, queries = (
            encode_corpus(
                model, corpus, run.config.data, encode, run.ranks, title=title, pulse=run.pulse, stop=run.stop
            )
            for corpus, title in ((train, "k-NN: train"), (val, "k-NN: val"))
        )
    except Stopped:
        run.cut_short()
        return
    top1 = knn_predictions(bank, queries, len(classes), config).accuracies()["top1"]
    run.log.log(run.step, {_NAME: top1, _LARGEST: largest_share(queries.labels.tolist())})
