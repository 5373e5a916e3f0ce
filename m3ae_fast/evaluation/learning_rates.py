"""Choice of a linear probe's learning rate among several that are tried at once on the same cached features, as in
DINOv2 (arXiv 2304.07193).

Shapes: S samples of a step, N held-out samples, D encoder width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from m3ae_fast.evaluation.encoding import key_digest
from m3ae_fast.evaluation.feature_bank import FeatureBank

FACTORS = (0.01, 0.03, 0.1, 0.3, 1, 3)  # candidate learning rates, as multiples of the recipe's learning rate


class RateTrial(NamedTuple):
    """A learning rate with its results on the held-out samples."""

    peak_lr: float  # peak learning rate, or inverse strength of a penalty
    top1: float  # 0 if the training diverged
    loss: float | None  # None if the training diverged


class Split(NamedTuple):
    """A split of the training samples, as ascending sample indices."""

    train: list[int]
    held_out: list[int]


def split(bank: FeatureBank) -> Split:
    """Split the samples into nine tenths for training and one tenth that is held out, by a hash of their keys. If there
    are fewer than ten samples, none is held out."""
    order = sorted(range(len(bank.keys)), key=lambda row: key_digest(bank.keys[row]))
    few = len(order) // 10
    return Split(sorted(order[few:]), sorted(order[:few]))


def best(tried: Sequence[RateTrial]) -> RateTrial:
    """Return the learning rate with the highest accuracy; in a tie, the one with the lowest loss."""
    return max(tried, key=lambda each: (each.top1, -math.inf if each.loss is None else -each.loss))


def choose(tried: Sequence[RateTrial], usual: float, held_out: int) -> RateTrial:
    """Return the learning rate nearest to the `usual` one among those whose accuracy is within one standard error of
    the highest (the one-standard-error rule of Breiman et al. 1984). With few samples, the highest accuracy is largely
    due to chance.

    Args:
        tried: results of the learning rates; not empty.
        usual: the recipe's learning rate.
        held_out: number of held-out samples.
    """
    top = best(tried).top1
    good = [each for each in tried if each.top1 >= top - math.sqrt(top * (1 - top) / held_out)]
    return min(good, key=lambda each: (each.loss is None, abs(math.log(each.peak_lr / usual))))


def edge(tried: Sequence[RateTrial], peak_lr: float | None) -> list[str]:
    """Return a list that contains a warning if the chosen learning rate `peak_lr` is the lowest or the highest of those
    that were tried; otherwise an empty list."""
    rates = [each.peak_lr for each in tried]
    if not rates or peak_lr not in (rates[0], rates[-1]):
        return []
    side, beyond = ("lowest", "lower") if peak_lr == rates[0] else ("highest", "higher")
    return [f"the selected learning rate, {peak_lr:g}, is the {side} candidate; also try a {beyond} linear.peak_lr"]
