"""Several learning rates of a linear probe, tried at once on the same cached features, as in DINOv2 (arXiv 2304.07193).

Shapes: S samples of a step, N held-out samples, D encoder width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.progress import track
from m3ae_fast.config.evaluation import LinearProbeConfig
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation.encoding import key_digest
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import LinearProbeHead
from m3ae_fast.evaluation.lars import LARS
from m3ae_fast.evaluation.probe_engine import CachedSteps
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.ranks import Ranks

FACTORS = (0.01, 0.03, 0.1, 0.3, 1, 3)  # of the recipe's rate


class Tried(NamedTuple):
    """A rate and how well it did on the held-out samples."""

    peak_lr: float
    top1: float  # 0 where it diverged
    loss: float | None  # None where it diverged


def try_rates(
    bank: FeatureBank, config: LinearProbeConfig, classes: int, seed: int, ranks: Ranks, pulse: Pulse
) -> list[Tried]:
    """Train a head for each multiple of the config's rate on nine tenths of the samples, for as many steps as the run
    will take, and return what each comes to on the rest. Empty where there are fewer than ten samples.

    The heads begin alike and see the same batches, whose BatchNorm they share. What is drawn by torch afterwards is not
    changed.

    Args:
        bank: features of the training samples, with labels.
        config: settled.
        classes: number of them.
        seed: of weights and order.
        ranks: each does the same.
        pulse: marked at each step.
    """
    train, held_out = split(bank)
    if not held_out.keys:
        return []
    schedule = Schedule(config, config, len(bank.keys))
    with torch.random.fork_rng():
        heads = [_head(bank.features_RD.shape[1], classes, seed).to(ranks.device) for _ in FACTORS]
    norm = heads[0].norm
    groups = [{"params": [*head.linear.parameters()]} for head in heads]
    lars = LARS(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    batches = CachedSteps(train, range(schedule.total_steps), schedule.train.global_batch, seed)
    title = f"trying {len(FACTORS)} rates"
    for step, batch in enumerate(track(batches, title, schedule.total_steps)):
        pulse.mark(title)
        batch = batch.to(ranks.device)
        x_SD = norm(batch.features_SD)
        lars.zero_grad()
        torch.stack([F.cross_entropy(head.linear(x_SD), batch.labels) for head in heads]).sum().backward()
        for group, factor in zip(lars.param_groups, FACTORS):
            group["lr"] = factor * schedule.lr(step)
        lars.step()
    norm.eval()
    assert held_out.labels_N is not None
    with torch.no_grad():
        x_ND, labels_N = norm(held_out.features_RD.to(ranks.device)), held_out.labels_N.to(ranks.device)
        return [judged(_times(config, f), head.linear(x_ND), labels_N) for f, head in zip(FACTORS, heads)]


def split(bank: FeatureBank) -> tuple[FeatureBank, FeatureBank]:
    """Return nine tenths of the samples and the rest, by a hash of their keys; both in the bank's order. There is no
    rest of fewer than ten samples."""
    order = sorted(range(len(bank.keys)), key=lambda row: key_digest(bank.keys[row]))
    few = len(order) // 10
    return bank.rows(sorted(order[few:])), bank.rows(sorted(order[:few]))


def best(tried: Sequence[Tried]) -> Tried:
    """Return the rate of the highest accuracy; of equal ones, that of the lowest loss."""
    return max(tried, key=lambda each: (each.top1, -math.inf if each.loss is None else -each.loss))


def choose(tried: Sequence[Tried], usual: float, held_out: int) -> Tried:
    """Return the rate nearest to the `usual` one among those whose accuracy is within a standard error of the highest:
    with few samples, the best rate is selected largely by chance (the one-standard-error rule of Breiman et al. 1984).

    Args:
        tried: not empty.
        usual: the recipe's rate.
        held_out: how many samples the accuracies are of.
    """
    top = best(tried).top1
    good = [each for each in tried if each.top1 >= top - math.sqrt(top * (1 - top) / held_out)]
    return min(good, key=lambda each: (each.loss is None, abs(math.log(each.peak_lr / usual))))


def edge(tried: Sequence[Tried], peak_lr: float | None) -> list[str]:
    """Return a line where the rate that the run has is the lowest or the highest of those tried."""
    rates = [each.peak_lr for each in tried]
    if not rates or peak_lr not in (rates[0], rates[-1]):
        return []
    side = "lowest" if peak_lr == rates[0] else "highest"
    return [f"the chosen rate, {peak_lr:g}, is the {side} of those tried; set linear.peak_lr to one beyond it"]


def table(tried: Sequence[Tried], chosen: float) -> str:
    """Return rates with their accuracies, and the one that was chosen, as a line."""
    return ", ".join(f"{each.peak_lr:g}: {each.top1:.1%}" for each in tried) + f"; chosen: {chosen:g}"


def _head(dim: int, classes: int, seed: int) -> LinearProbeHead:
    torch.manual_seed(seed)
    return LinearProbeHead(dim, classes).train()


def _times(config: LinearProbeConfig, factor: float) -> float:
    assert config.peak_lr is not None
    return float(f"{factor * config.peak_lr:.3g}")


def judged(peak_lr: float, logits_NK: Tensor, labels_N: Tensor) -> Tried:
    """Return how well a rate did, by the logits of the held-out samples."""
    if not logits_NK.isfinite().all():
        return Tried(peak_lr, 0.0, None)
    correct = (logits_NK.argmax(1) == labels_N).double().mean()
    return Tried(peak_lr, correct.item(), F.cross_entropy(logits_NK, labels_N).item())
