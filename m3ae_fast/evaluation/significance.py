"""Standard errors of accuracies, and significance tests between two accuracies on the same samples.

Shapes: N samples, B bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ERROR = "_se"  # suffix of an accuracy's name that denotes its standard error
_RESAMPLES = 10_000  # number of bootstrap samples
LEVEL = 0.05  # significance level of the tests; 1 minus the coverage of the intervals


def standard_error(accuracy: float, samples: int) -> float:
    """Return the standard error of an accuracy on this number of samples. If the accuracy is 0 or 1, Laplace's estimate
    is used in its place, so that the standard error is not 0."""
    likely = accuracy if 0 < accuracy < 1 else (accuracy * samples + 1) / (samples + 2)
    return math.sqrt(likely * (1 - likely) / samples)


def mean_accuracy(correct_DN: np.ndarray) -> tuple[float, float]:
    """Return the mean accuracy of D trials on the same samples, and its standard error over samples and trials.
    `correct_DN`: whether each sample was classified correctly in each trial, bool."""
    trials, samples = correct_DN.shape
    accuracies_D, shares_N = correct_DN.mean(1), correct_DN.mean(0)
    of_trials = accuracies_D.var(ddof=1) / trials if trials > 1 else 0.0
    mean = float(shares_N.mean())
    of_samples = shares_N.var() / samples if 0 < mean < 1 else standard_error(mean, samples) ** 2
    return mean, math.sqrt(of_samples + of_trials)


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


def difference(first_N: np.ndarray, second_N: np.ndarray, seed: int = 0) -> Difference:
    """Return the difference between two classifiers on the same samples.

    Args:
        first_N, second_N: whether each sample is classified correctly, bool; or the fraction of seeds with which it is
            classified correctly. For McNemar's test, fractions above one half count as correct, and samples with
            fractions of exactly one half are excluded.
        seed: random seed of the bootstrap.
    """
    apart_N = first_N.astype(np.float64) - second_N.astype(np.float64)
    interval = middle(_bootstrap_means(apart_N, seed))
    decided_N = (first_N != 0.5) & (second_N != 0.5)
    return Difference(apart_N.mean().item(), *interval, mcnemar(first_N[decided_N] > 0.5, second_N[decided_N] > 0.5))


def mcnemar(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Return the p-value of McNemar's exact two-sided test: if two classifiers are equally good, each sample that only
    one of them classifies correctly is equivalent to the toss of a fair coin. `first_N`, `second_N`: whether each
    sample is classified correctly, bool."""
    fewer, more = sorted((int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())))
    tosses = fewer + more
    log_factorials = np.concatenate(([0.0], np.log(np.arange(1, tosses + 1)).cumsum()))
    heads = np.arange(fewer + 1)
    logs = log_factorials[tosses] - log_factorials[heads] - log_factorials[tosses - heads] - tosses * math.log(2)
    return min(1.0, 2 * float(np.exp(logs).sum()))


def _bootstrap_means(values_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the means of the bootstrap samples of N values, [B]."""
    count, generator = len(values_N), np.random.default_rng(seed)
    found, counts = np.unique(values_N, return_counts=True)  # there are few distinct values, so only counts are drawn
    drawn = generator.multinomial(count, counts / count, size=_RESAMPLES)
    return drawn @ found / count
