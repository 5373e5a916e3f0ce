"""Choice of a hyper-parameter on held-out training samples: the number of neighbours of k-NN, the penalty of logistic
regression, or the learning rate of attentive probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from m3ae_fast.heads.encoding import key_digest
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.standard_error import standard_error


class Trial(NamedTuple):
    """A value of the hyper-parameter with its results on the held-out samples."""

    value: float
    quality: float  # see `Predictions.quality`; 0 if the training diverged
    loss: float | None  # None if the training diverged


def split(bank: FeatureBank, most: int | None = None) -> tuple[list[int], list[int]]:
    """Split the samples, and return the numbers of the training samples and those of the held-out samples, ascending. A
    tenth of the samples is held out, but at most `most`, and none if there are fewer than ten samples. Held-out samples
    are selected by a hash of the image or, if this is unknown, of the key. Copies of an image are either all held out
    or all used for training, so slightly fewer samples may be held out."""
    names = [image or key for image, key in zip(bank.image_hashes or [""] * len(bank.keys), bank.keys)]
    digests = [key_digest(name) for name in names]
    order = sorted(range(len(names)), key=digests.__getitem__)
    few = len(order) // 10 if most is None else min(len(order) // 10, most)
    while few and digests[order[few - 1]] == digests[order[few]]:
        few -= 1
    return sorted(order[few:]), sorted(order[:few])


def best(tried: Sequence[Trial]) -> Trial:
    """Return the value with the highest quality; in a tie, the one with the lowest loss."""
    return max(tried, key=lambda each: (each.quality, -math.inf if each.loss is None else -each.loss))


def within_error(tried: Sequence[Trial], held_out: int) -> list[Trial]:
    """Return the values whose accuracy is within one standard error of the highest (the one-standard-error rule of
    Breiman et al. 1984), because with few samples, the highest accuracy is largely due to chance.

    Args:
        tried: results of the values; not empty.
        held_out: number of held-out samples.
    """
    top = best(tried).quality
    return [each for each in tried if each.quality >= top - standard_error(top, held_out)]


def edge(tried: Sequence[Trial], peak_lr: float) -> list[str]:
    """Return a list that contains a warning if the chosen learning rate `peak_lr` is the lowest or the highest of those
    that were tried; otherwise an empty list."""
    rates = [each.value for each in tried]
    if not rates or peak_lr not in (rates[0], rates[-1]):
        return []
    side, beyond = ("lowest", "lower") if peak_lr == rates[0] else ("highest", "higher")
    return [f"the selected learning rate, {peak_lr:g}, is the {side} candidate; also try a {beyond} attentive.peak_lr"]
