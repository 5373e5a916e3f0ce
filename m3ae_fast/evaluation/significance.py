"""Significance tests between two accuracies on the same samples, and statistics of several trials.

Samples with the same image form a cluster; see `heads.standard_error`. The bootstrap draws clusters, and McNemar's test
tosses a coin for each cluster. If no image occurs twice, these are the usual methods for independent samples.

Shapes: N samples, C clusters, B bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.heads.standard_error import Resampled, error_of_accuracy

_RESAMPLES = 10_000  # number of bootstrap samples
_NORMAL = 1.959964  # half the length of a 95 % interval of a normal distribution, in standard deviations
LEVEL = 0.05  # significance level of the tests; 1 minus the coverage of the intervals


def mean_accuracy(correct_DN: np.ndarray, clusters_N: np.ndarray | None = None) -> tuple[float, float]:
    """Return the mean accuracy of D trials on the same samples, and its standard error over samples and trials.
    `correct_DN`: whether each sample was classified correctly in each trial, bool. `clusters_N`: see
    `error_of_accuracy`."""
    trials = len(correct_DN)
    accuracies_D, shares_N = correct_DN.mean(1), correct_DN.mean(0)
    of_trials = accuracies_D.var(ddof=1) / trials if trials > 1 else 0.0
    return float(shares_N.mean()), math.hypot(error_of_accuracy(shares_N, clusters_N), math.sqrt(of_trials))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of at least two values, computed with Student's t
    distribution."""
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * float(t.ppf(1 - LEVEL / 2, len(values) - 1))
    return mean - half, mean + half


def area_under_roc(positive_V: np.ndarray, negative_V: np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a positive sample has a higher score than a negative
    one, where equal scores count as one half. `positive_V`, `negative_V`: numbers of positive and of negative samples
    with each of V distinct scores, in ascending order."""
    lower_V = negative_V.cumsum() - negative_V / 2
    return float(positive_V @ lower_V) / (int(positive_V.sum()) * int(negative_V.sum()))


class Difference(NamedTuple):
    """The difference between two metrics on the same samples, such as two accuracies: first minus second."""

    value: float
    low: float  # lower end of the 95 % confidence interval, computed by the bootstrap
    high: float
    p: float | None = None  # p-value of McNemar's exact test; None for metrics other than accuracies

    @property
    def is_significant(self) -> bool:
        """Return whether the interval excludes 0 and the p-value, if there is one, is below LEVEL."""
        return not self.low <= 0 <= self.high and (self.p is None or self.p < LEVEL)

    @property
    def error(self) -> float:
        """Return the standard error, computed from the interval as if the bootstrap samples were normally
        distributed."""
        return (self.high - self.low) / (2 * _NORMAL)

    @property
    def is_better(self) -> bool:
        """Return whether the first metric is significantly better than the second."""
        return self.is_significant and self.value > 0

    def points(self) -> str:
        """Return the value and its interval, in percentage points, as text."""
        return f"{100 * self.value:+.1f} points, 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"

    def words(self, first: str, second: str) -> str:
        """Return a sentence about the difference. `first`, `second`: names of the models."""
        test = "" if self.p is None else f", McNemar p = {self.p:.2g}"
        return f"{verdict(first, second, self.value, self.is_significant)}: {self.points()}{test}"

    def entries(self) -> dict[str, Any]:
        """Return the difference as entries of result.json. There is no "p" if there is no p-value."""
        numbers = {name: value for name, value in self._asdict().items() if value is not None}
        return numbers | {"significant": self.is_significant}

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> Difference:
        """Return the difference with the given `entries`."""
        return cls(entries["value"], entries["low"], entries["high"], entries.get("p"))


def verdict(first: str, second: str, value: float, is_significant: bool) -> str:
    """Return a sentence that states whether the model `first` is better or worse than the model `second`, or not
    significantly different. `value`: difference, positive if the first model is better."""
    if not is_significant:
        return f"{first} does not differ significantly from {second} on these samples"
    return f"{first} is {'better' if value > 0 else 'worse'} than {second}"


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval that contains the middle 95 % of the values of bootstrap samples, [B]."""
    low, high = np.quantile(values, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def resampled_difference(first: Resampled, second: Resampled) -> Difference | None:
    """Return the difference between two metrics of the same samples; None if its interval cannot be estimated. The
    interval is computed from bootstrap samples, whose bias is subtracted. For example, repeated samples raise an
    average precision, so all values of bootstrap samples may be higher than the value of the original samples."""
    if not (first.varies or second.varies):
        return None
    value, apart_B = first.value - second.value, first.values_B[1:] - second.values_B[1:]
    return Difference(value, *middle(apart_B - apart_B.mean() + value))


def difference(first_N: np.ndarray, second_N: np.ndarray, clusters_N: np.ndarray | None = None) -> Difference:
    """Return the difference between two classifiers on the same samples.

    Args:
        first_N, second_N: whether each sample is classified correctly, bool; or the fraction of seeds with which it is
            classified correctly. For McNemar's test, fractions above one half count as correct, and samples with
            fractions of exactly one half are excluded.
        clusters_N: see `error_of_accuracy`.
    """
    apart_N = first_N.astype(np.float64) - second_N.astype(np.float64)
    clusters_N = np.arange(len(apart_N)) if clusters_N is None else clusters_N
    interval = middle(_bootstrap_means(apart_N, clusters_N))
    decided_N = (first_N != 0.5) & (second_N != 0.5)
    p = mcnemar(first_N[decided_N] > 0.5, second_N[decided_N] > 0.5, clusters_N[decided_N])
    return Difference(apart_N.mean().item(), *interval, p)


def mcnemar(first_N: np.ndarray, second_N: np.ndarray, clusters_N: np.ndarray | None = None) -> float:
    """Return the p-value of McNemar's exact two-sided test. It counts the samples that only one of two classifiers
    classifies correctly. If both classifiers are equally good, either of them is the correct one with the same
    probability, as in the toss of a fair coin.

    With clusters, one coin is tossed for each cluster. It decides the sign of the difference between the numbers of
    correct samples of the two classifiers: this is Fisher's randomisation test (Fisher 1935, "The Design of
    Experiments", section 21) of the cluster totals. The normal approximation of this test is that of Yang, Sun and
    Hardin (2010, "A note on the tests for clustered matched-pair binary data").

    Args:
        first_N, second_N: whether each sample is classified correctly, bool.
        clusters_N: see `error_of_accuracy`.
    """
    apart_N = first_N.astype(np.int64) - second_N
    apart_C = apart_N if clusters_N is None else np.bincount(clusters_N, apart_N).round().astype(np.int64)
    apart_C = apart_C[apart_C != 0]
    if not len(apart_C):
        return 1.0
    apart_C = apart_C // np.gcd.reduce(apart_C)
    fewer = int(min(apart_C[apart_C > 0].sum(), -apart_C[apart_C < 0].sum()))
    # probability that the clusters whose coins show heads have a total of 0, 1, ..., `fewer`
    chances = np.zeros(fewer + 1)
    chances[0] = 1
    for size, tosses in zip(*(each.tolist() for each in np.unique(abs(apart_C), return_counts=True))):
        before, chances = chances, np.zeros(fewer + 1)
        for heads, chance in enumerate(_coins(tosses, min(tosses, fewer // size)).tolist()):
            chances[heads * size :] += chance * before[: fewer + 1 - heads * size]
    return min(1.0, 2 * float(chances.sum()))


def _coins(tosses: int, most: int) -> np.ndarray:
    """Return the probabilities of 0, 1, ..., `most` heads among this number of tosses of a fair coin."""
    log_factorials = np.concatenate(([0.0], np.log(np.arange(1, tosses + 1)).cumsum()))
    heads = np.arange(most + 1)
    logs = log_factorials[tosses] - log_factorials[heads] - log_factorials[tosses - heads] - tosses * math.log(2)
    return np.exp(logs)


def _bootstrap_means(values_N: np.ndarray, clusters_N: np.ndarray) -> np.ndarray:
    """Return the means of N values in bootstrap samples of their clusters, [B]."""
    clusters_C = np.stack((np.bincount(clusters_N, values_N), np.bincount(clusters_N)), 1)  # sum and size
    count, generator = len(clusters_C), np.random.default_rng(0)
    # many clusters have equal sums and sizes, so it is sufficient to draw how often each kind of cluster occurs
    found, counts = np.unique(clusters_C, axis=0, return_counts=True)
    drawn = generator.multinomial(count, counts / count, size=_RESAMPLES)
    return (drawn @ found[:, 0]) / (drawn @ found[:, 1])
