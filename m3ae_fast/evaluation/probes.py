"""The probes of frozen features that need nothing but those: each scores held-out samples by training samples.

Shapes: N training samples, M samples to classify, L patches, D encoder width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from m3ae_fast.base.progress import track
from m3ae_fast.config.evaluation import LinearProbeConfig
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation import attentive
from m3ae_fast.evaluation.default_hyperparameters import settled
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import LinearProbeHead
from m3ae_fast.evaluation.knn import knn_predictions
from m3ae_fast.evaluation.learning_rates import choose, try_rates
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.probe_engine import CachedSteps, ProbeEngine, Setting


class Probe(NamedTuple):
    """A kind of probe."""

    predict: Callable[[FeatureBank, FeatureBank, Setting], Predictions]  # by training samples, what held-out ones are
    tokens: bool = False  # whether its features are [R, L, D], the patch tokens
    seeded: bool = True  # whether the seed plays a part


def _knn(bank: FeatureBank, held_out: FeatureBank, setting: Setting) -> Predictions:
    return knn_predictions(bank, held_out, setting.classes, setting.config.knn)


def _linear(bank: FeatureBank, held_out: FeatureBank, setting: Setting) -> Predictions:
    bank, held_out = bank.gathered(), held_out.gathered()
    head = fit_linear(bank, setting).eval()
    with torch.no_grad():
        scores_MC = head(held_out.features_RD.to(setting.ranks.device)).cpu()
    return Predictions.of(held_out.keys, held_out.labels, scores_MC)


def fit_linear(bank: FeatureBank, setting: Setting) -> LinearProbeHead:
    """Return the head that `evaluate linear --cache-features` would end with, to the bit."""
    ranks, encode = setting.ranks, setting.config.encode
    config = _with_rate(bank, settled(setting.config.linear, len(bank.keys), {}), setting)
    schedule = Schedule(config, config, len(bank.keys))
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        head = LinearProbeHead(bank.features_RD.shape[1], setting.classes).to(ranks.device)
    engine = ProbeEngine(head, config, ranks, None, encode)
    batches = CachedSteps(bank, range(schedule.total_steps), schedule.train.global_batch, setting.seed)
    for step, batch in enumerate(track(batches, "linear probe", schedule.total_steps)):
        setting.pulse.mark("training a linear probe")
        engine.step([batch.to(ranks.device)], 0.0, schedule.lr(step))
    return head


def _with_rate(bank: FeatureBank, config: LinearProbeConfig, setting: Setting) -> LinearProbeConfig:
    if setting.config.linear.peak_lr is not None:
        return config
    tried = try_rates(bank, config, setting.classes, setting.seed, setting.ranks, setting.pulse)
    if not tried or config.peak_lr is None:
        return config
    chosen = choose(tried, config.peak_lr, len(bank.keys) // 10)
    return config.model_copy(update={"peak_lr": chosen.peak_lr})


def _attentive(bank: FeatureBank, held_out: FeatureBank, setting: Setting) -> Predictions:
    bank, held_out = bank.gathered(), held_out.gathered()
    config = attentive.settled(setting.config.attentive, len(bank.keys), setting.encoder_heads)
    trained = attentive.fit(bank, config, setting)
    for text in attentive.cautions_of(trained, config):
        setting.caution(text)
    return Predictions.of(held_out.keys, held_out.labels, attentive.logits(trained.head, held_out, setting.ranks))


PROBES = {"knn": Probe(_knn, seeded=False), "linear": Probe(_linear), "attentive": Probe(_attentive, tokens=True)}
