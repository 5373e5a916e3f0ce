"""Several learning rates of a linear probe, tried at once on the same cached features, as in DINOv2 (arXiv 2304.07193).

Shapes: S samples of a step, N held-out samples, D encoder width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from m3ae_fast.evaluation.encoding import key_digest
from m3ae_fast.evaluation.feature_bank import FeatureBank

FACTORS = (0.01, 0.03, 0.1, 0.3, 1, 3)  # of the recipe's rate


class Tried(NamedTuple):
    """A rate and how well it did on the held-out samples."""

    peak_lr: float
    top1: float  # 0 where it diverged
    loss: float | None  # None where it diverged


class Split(NamedTuple):
    """Numbers of samples, ascending."""

    train: list[int]
    held_out: list[int]


def split(bank: FeatureBank) -> Split:
    """Return nine tenths of the samples and the rest, by a hash of their keys. There is no rest of fewer than ten
    samples."""
    order = sorted(range(len(bank.keys)), key=lambda row: key_digest(bank.keys[row]))
    few = len(order) // 10
    return Split(sorted(order[few:]), sorted(order[:few]))


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
