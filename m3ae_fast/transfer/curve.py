"""k-NN accuracy while a model trains: shows how the representation transfers, beside the loss."""

from __future__ import annotations

from dataclasses import dataclass

from m3ae_fast.config import KnnProbeConfig
from m3ae_fast.config.transfer import EncodeConfig
from m3ae_fast.data import Corpus, ShardStore, open_corpus
from m3ae_fast.data.labels import Classes, label_corpus
from m3ae_fast.encoding import encode_corpus
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.signals import StopRequest
from m3ae_fast.process.stopping import Stopped
from m3ae_fast.run.run import Run
from m3ae_fast.transfer.knn import knn_scores
from m3ae_fast.transfer.metrics import accuracies

_NAME = "val_knn_top1"


@dataclass(frozen=True)
class TransferCurve:
    """Labelled samples of `train.probe`, opened before training starts."""

    config: KnnProbeConfig
    train: Corpus
    val: Corpus
    classes: Classes

    @classmethod
    def of(cls, run: Run) -> TransferCurve | None:
        """None where the config asks for none.

        Raises:
            UserError: shards or labels cannot be used.
        """
        config = run.config.train.probe
        if config is None:
            return None
        store, ranks = ShardStore(run.config.data.cache_dir), run.ranks

        def open_both() -> tuple[Corpus, Corpus, Classes]:
            train, val = (open_corpus(s, store, progress=ranks.is_main) for s in (config.train, config.val))
            train, classes = label_corpus(train, config.labels, progress=ranks.is_main)
            return train, label_corpus(val, config.labels, classes, progress=ranks.is_main)[0], classes

        train, val, classes = ranks.main_first(open_both)
        if train.has_captions or val.has_captions:
            raise UserError('train.probe: takes only images; set "modality": "image" on its sources')
        return cls(config, train, val, classes)

    def log(self, run: Run, stop: StopRequest) -> None:
        """Log the accuracy where it is due, unless a rank is asked to stop, even half-way. Every rank must call it."""
        if not run.to_evaluate(self.config.every, _NAME):
            return
        run.stop_if_not_finite()
        model = run.engine.model
        assert isinstance(model, M3AE)
        encode = EncodeConfig(pool=self.config.pool, precision=run.config.train.precision)
        try:
            bank, queries = (
                encode_corpus(
                    model, corpus, run.config.data, encode, run.ranks, title=title, pulse=run.pulse, stop=stop
                )
                for corpus, title in ((self.train, "k-NN: train"), (self.val, "k-NN: val"))
            )
        except Stopped:
            run.cut_short()
            return
        assert bank.labels_N is not None and queries.labels_N is not None
        scores_MC = knn_scores(
            bank.features_ND,
            bank.labels_N,
            queries.features_ND,
            len(self.classes),
            self.config.k,
            self.config.temperature,
        )
        if run.log:
            run.log.log(run.step, {_NAME: accuracies(scores_MC, queries.labels_N)["top1"]})
