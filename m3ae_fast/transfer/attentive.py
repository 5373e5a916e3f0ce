"""Attentive probe: a learnt query pools the frozen encoder's patch tokens, and a linear layer classifies what it finds.

Shapes: N samples, S of a step, L patches, D encoder width, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.config.transfer import AttentiveProbeConfig
from m3ae_fast.encoding import Features
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.process.pulse import Pulse
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.progress import track
from m3ae_fast.transfer.heads import AttentiveHead
from m3ae_fast.transfer.probe_engine import CachedSteps
from m3ae_fast.transfer.rates import Tried, best, judged, split
from m3ae_fast.transfer.recipe import OFFICIAL

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # tried, of AdamW
_WARMUP = 1 / 9  # of the run, as of the linear probe
_AT_A_TIME = 256  # samples to classify


def settled(config: AttentiveProbeConfig, samples: int, encoder_heads: int) -> AttentiveProbeConfig:
    """Return the config with a value for each setting that it leaves open, but for the rate."""
    recipe = OFFICIAL["linear"].scaled(samples)
    batch = min(config.batch or recipe.global_batch, samples)
    steps = config.steps or math.ceil(recipe.epochs * samples / batch)
    return config.model_copy(update={"batch": batch, "steps": steps, "heads": config.heads or encoder_heads})


def try_rates(
    bank: Features, config: AttentiveProbeConfig, classes: int, seed: int, ranks: Ranks, pulse: Pulse
) -> list[Tried]:
    """Train a head at each of RATES on nine tenths of the samples, and return what each comes to on the rest. Empty
    where there are fewer than ten samples. Arguments as of `train_heads`."""
    train, held_out = split(bank)
    if not held_out.keys:
        return []
    heads = train_heads(train, config, RATES, classes, seed, ranks, pulse)
    assert held_out.labels_N is not None
    return [judged(rate, logits(head, held_out, ranks), held_out.labels_N) for rate, head in zip(RATES, heads)]


def fit(
    bank: Features, config: AttentiveProbeConfig, classes: int, seed: int, ranks: Ranks, pulse: Pulse
) -> AttentiveHead:
    """Return a head trained at the config's rate, or at the best of those tried. Arguments as of `train_heads`."""
    rate = config.peak_lr
    if rate is None:
        tried = try_rates(bank, config, classes, seed, ranks, pulse)
        rate = best(tried).peak_lr if tried else 1e-3
    return train_heads(bank, config, (rate,), classes, seed, ranks, pulse)[0]


def train_heads(
    bank: Features,
    config: AttentiveProbeConfig,
    rates: tuple[float, ...],
    classes: int,
    seed: int,
    ranks: Ranks,
    pulse: Pulse,
) -> list[AttentiveHead]:
    """Train a head at each rate, all on the same batches, and return them in evaluation mode.

    Args:
        bank: tokens of the training samples, `features_ND` [N, L, D], with labels.
        config: settled.
        rates: learning rates after warm-up.
        classes: number of them.
        seed: of weights and order.
        ranks: each does the same.
        pulse: marked at each step.
    """
    assert config.steps and config.batch and config.heads
    heads, optimizers = [], []
    with torch.random.fork_rng():
        for rate in rates:
            torch.manual_seed(seed)
            head = AttentiveHead(bank.features_ND.shape[-1], classes, config.heads).to(ranks.device).train()
            heads.append(head)
            optimizers.append(torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=config.weight_decay))
    title = f"attentive probe, {len(rates)} rates" if len(rates) > 1 else "attentive probe"
    batches = CachedSteps(bank, range(config.steps), config.batch, seed)
    for step, batch in enumerate(track(batches, title, config.steps, show=ranks.is_main)):
        pulse.mark(title)
        batch = batch.to(ranks.device)
        tokens_SLD = batch.features_SD.float()
        for rate, head, optimizer in zip(rates, heads, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(head(tokens_SLD), batch.labels).backward()
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, round(config.steps * _WARMUP), config.steps, peak=rate)
            optimizer.step()
    return [head.eval() for head in heads]


@torch.no_grad()
def logits(head: AttentiveHead, samples: Features, ranks: Ranks) -> Tensor:
    """Return [N, K] of samples with their tokens as `features_ND`, on the CPU."""
    parts = samples.features_ND.split(_AT_A_TIME)
    return torch.cat([head(part.to(ranks.device).float()).cpu() for part in parts])
