"""Attentive probe: a learnt query pools the frozen encoder's patch tokens, and a linear layer classifies what it finds.

Shapes: N samples, S of a step, L patches, D encoder width, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.base.progress import track
from m3ae_fast.config.evaluation import AttentiveProbeConfig
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import AttentiveHead
from m3ae_fast.evaluation.labelled_task import cautions
from m3ae_fast.evaluation.learning_rates import Tried, best, judged, split
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.probe_engine import CachedSteps, Live, Setting
from m3ae_fast.process.ranks import Ranks

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # tried, of AdamW
_WARMUP = 1 / 9  # of the run, as of the linear probe
_AT_A_TIME = 256  # samples to classify


class Trained(NamedTuple):
    """A head, and the fraction of each step's samples that it had right before that step."""

    head: AttentiveHead
    accuracies: list[float]


def settled(config: AttentiveProbeConfig, samples: int, encoder_heads: int) -> AttentiveProbeConfig:
    """Return the config with a value for each setting that it leaves open, but for the rate."""
    recipe = OFFICIAL["linear"].scaled(samples)
    batch = min(config.batch or recipe.global_batch, samples)
    steps = config.steps or math.ceil(recipe.epochs * samples / batch)
    return config.model_copy(update={"batch": batch, "steps": steps, "heads": config.heads or encoder_heads})


def try_rates(bank: FeatureBank, config: AttentiveProbeConfig, setting: Setting) -> list[Tried]:
    """Train a head at each of RATES on nine tenths of the samples, and return what each comes to on the rest. Empty
    where there are fewer than ten samples. Arguments as of `train_heads`."""
    train, held_out = split(bank)
    if not held_out.keys:
        return []
    trained = train_heads(train, config, RATES, setting)
    return [
        judged(rate, logits(each.head, held_out, setting.ranks), held_out.labels) for rate, each in zip(RATES, trained)
    ]


def fit(bank: FeatureBank, config: AttentiveProbeConfig, setting: Setting) -> Trained:
    """Return a head trained at the config's rate, or at the best of those tried. Arguments as of `train_heads`."""
    rate = config.peak_lr
    if rate is None:
        tried = try_rates(bank, config, setting)
        rate = best(tried).peak_lr if tried else 1e-3
    return train_heads(bank, config, (rate,), setting)[0]


def train_heads(
    bank: FeatureBank, config: AttentiveProbeConfig, rates: tuple[float, ...], setting: Setting
) -> list[Trained]:
    """Train a head at each rate, all on the same batches, and return them in evaluation mode; each rank does the same.
    `bank`: tokens of the training samples, `features_ND` [N, L, D]; `config`: settled."""
    assert config.steps and config.batch and config.heads
    ranks, heads, optimizers = setting.ranks, [], []
    with torch.random.fork_rng():
        for rate in rates:
            torch.manual_seed(setting.seed)
            head = AttentiveHead(bank.features_RD.shape[-1], setting.classes, config.heads).to(ranks.device).train()
            heads.append(head)
            optimizers.append(torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=config.weight_decay))
    right: list[list[Tensor]] = [[] for _ in rates]
    title = f"attentive probe, {len(rates)} rates" if len(rates) > 1 else "attentive probe"
    batches = CachedSteps(bank, range(config.steps), config.batch, setting.seed)
    live = setting.live or Live()
    live.begin(title, heads, config.steps)
    for step, batch in enumerate(track(batches, title, config.steps)):
        setting.pulse.mark(title)
        batch = batch.to(ranks.device)
        tokens_SLD = batch.features_SD.float()
        with live.steady:
            for rate, head, optimizer, own in zip(rates, heads, optimizers, right):
                optimizer.zero_grad()
                logits_SK = head(tokens_SLD)
                F.cross_entropy(logits_SK, batch.labels).backward()
                own.append((logits_SK.argmax(1) == batch.labels).float().mean())
                for group in optimizer.param_groups:
                    group["lr"] = warmup_cosine(step, round(config.steps * _WARMUP), config.steps, peak=rate)
                optimizer.step()
            live.stepped()
    return [Trained(head.eval(), torch.stack(own).tolist()) for head, own in zip(heads, right)]


def so_far(live: Live, bank: FeatureBank, held_out: FeatureBank, ranks: Ranks) -> tuple[Predictions, str] | None:
    """Return what the head in training makes of held-out samples before its end, and how far it is; of several rates
    the best on the tenth that `try_rates` holds out. None before the first step."""
    heads, where = live.copy()
    if not heads:
        return None
    head = heads[0]
    if len(heads) > 1:
        _, tenth = split(bank)
        tried = [judged(rate, logits(each, tenth, ranks), tenth.labels) for rate, each in zip(RATES, heads)]
        head = heads[tried.index(best(tried))]
    return Predictions.of(held_out.keys, held_out.labels, logits(head, held_out, ranks)), where


def cautions_of(trained: Trained, config: AttentiveProbeConfig) -> list[str]:
    """Return what speaks against taking a head's accuracy as it is, a line each; `config`: settled."""
    assert config.steps and config.batch
    lines = [{"accuracy": accuracy} for accuracy in trained.accuracies]
    return cautions("attentive", "attentive.steps", config.steps, OFFICIAL["linear"], lines, config.batch)


@torch.no_grad()
def logits(head: nn.Module, samples: FeatureBank, ranks: Ranks) -> Tensor:
    """Return [N, K] of samples with their tokens as `features_ND`, on the CPU."""
    parts = samples.features_RD.split(_AT_A_TIME)
    return torch.cat([head(part.to(ranks.device).float()).cpu() for part in parts])
