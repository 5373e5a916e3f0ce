"""Choice of an encoder's pooling by the accuracy of logistic regression on held-out training samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from m3ae_fast.config import POOLINGS, Pool
from m3ae_fast.heads.encoding import key_digest
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.logistic_regression import Tried, try_strengths
from m3ae_fast.process.heartbeats import Heartbeats

MOST_SAMPLES = 5000  # number of training samples with which the candidates are compared


class ChosenPool(NamedTuple):
    """The chosen pooling."""

    pool: Pool
    tried: Tried | None  # the regressions of its features; None if they are those of some of the samples


def best_pool(bank: FeatureBank, pools: Sequence[Pool], classes: int, heartbeats: Heartbeats) -> ChosenPool:
    """Return the pooling with the highest accuracy on held-out samples; in a tie, or if there are too few different
    samples to hold one out, the one that comes first. Every rank must call it, and gets the same result.

    Args:
        bank: features of the training samples [R, K, D], with the vectors of all poolings in the order of `pools`.
        pools: the candidates.
        classes: number of classes.
        heartbeats: heartbeats of this rank.
    """
    is_part = len(bank.keys) > MOST_SAMPLES
    if is_part:
        digests = [key_digest(key, "pool") for key in bank.keys]
        bank = bank.rows(sorted(sorted(range(len(digests)), key=digests.__getitem__)[:MOST_SAMPLES]))
    tried = {pool: try_strengths(part_of_pool(bank, pools, pool), classes, heartbeats) for pool in pools}
    accuracies = {pool: found.accuracy(bank.ranks) for pool, found in tried.items()}
    pool = max(accuracies, key=accuracies.__getitem__)
    return ChosenPool(pool, None if is_part else tried[pool])


def part_of_pool(bank: FeatureBank, pools: Sequence[Pool], pool: Pool) -> FeatureBank:
    """Return the features of one of several poolings, [R, D]. `bank`, `pools`: as in `best_pool`."""
    before = sum(POOLINGS[each].vectors for each in pools[: pools.index(pool)])
    return bank.part(before, POOLINGS[pool].vectors)
