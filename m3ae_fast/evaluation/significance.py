"""Standard errors of accuracies, and significance tests between two accuracies on the same samples.

Shapes: N samples, B bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ERROR = "_se"  # after the name of an accuracy: its standard error
_RESAMPLES = 10_000  # of the bootstrap
LEVEL = 0.05  # significance level of the tests; 1 minus the coverage of the intervals


def standard_error(accuracy: float, samples: int) -> float:
    """Return the standard error of a fraction of so many samples, which another draw of samples would change: of none
    or of all it is not 0, but that of Laplace's estimate."""
    likely = accuracy if 0 < accuracy < 1 else (accuracy * samples + 1) / (samples + 2)
    return math.sqrt(likely * (1 - likely) / samples)


def mean_accuracy(correct_DN: np.ndarray) -> tuple[float, float]:
    """Return the mean accuracy of D trials on the same samples, bool [D, N], and its error over samples and trials."""
    trials, samples = correct_DN.shape
    accuracies_D, shares_N = correct_DN.mean(1), correct_DN.mean(0)
    of_trials = accuracies_D.var(ddof=1) / trials if trials > 1 else 0.0
    mean = float(shares_N.mean())
    of_samples = shares_N.var() / samples if 0 < mean < 1 else standard_error(mean, samples) ** 2
    return mean, math.sqrt(of_samples + of_trials)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of several values, by Student's t."""
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * float(t.ppf(1 - LEVEL / 2, len(values) - 1))
    return mean - half, mean + half


def area_under_roc(positive_V: np.ndarray, negative_V: np.ndarray) -> float:
    """Return the area under the ROC curve of V different scores, ascending, that so many positive and so many negative
    samples have: the probability that a positive one has the higher score, where equal ones count one half."""
    lower_V = negative_V.cumsum() - negative_V / 2
    return float(positive_V @ lower_V) / (int(positive_V.sum()) * int(negative_V.sum()))


class Difference(NamedTuple):
    """The difference of two accuracies on the same samples: first minus second."""

    value: float
    low: float  # 95 % interval, by the bootstrap
    high: float
    p: float  # McNemar's exact test

    @property
    def is_significant(self) -> bool:
        """Return whether the interval and the test both say so."""
        return not self.low <= 0 <= self.high and self.p < LEVEL

    def words(self, first: str, second: str) -> str:
        """Return the difference as a sentence."""
        numbers = f"{100 * self.value:+.1f} points, 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"{verdict(first, second, self.value, self.is_significant)}: {numbers}, McNemar p = {self.p:.2g}"


def verdict(first: str, second: str, value: float, is_significant: bool) -> str:
    """Compare the first with the second. `value`: difference, positive if the first is better."""
    if not is_significant:
        return f"{first} does not differ significantly from {second} on these samples"
    return f"{first} is {'better' if value > 0 else 'worse'} than {second}"


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval that holds the middle 95 % of some draws' values."""
    low, high = np.quantile(values, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def difference(first_N: np.ndarray, second_N: np.ndarray, seed: int = 0) -> Difference:
    """Compare two classifiers by how often each sample was right, from 0 to 1: bool, or a mean over seeds, of which
    McNemar's test counts values above a half as correct and excludes values of exactly a half. `seed`: of the
    bootstrap."""
    apart_N = first_N.astype(np.float64) - second_N.astype(np.float64)
    interval = middle(_bootstrap_means(apart_N, seed))
    decided_N = (first_N != 0.5) & (second_N != 0.5)
    return Difference(apart_N.mean().item(), *interval, mcnemar(first_N[decided_N] > 0.5, second_N[decided_N] > 0.5))


def mcnemar(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Return the p value of McNemar's exact test, two-sided, of which samples (bool each) each alone has right: those
    are tosses of a fair coin if the two are equally good."""
    fewer, more = sorted((int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())))
    tosses = fewer + more
    log_factorials = np.concatenate(([0.0], np.log(np.arange(1, tosses + 1)).cumsum()))
    heads = np.arange(fewer + 1)
    logs = log_factorials[tosses] - log_factorials[heads] - log_factorials[tosses - heads] - tosses * math.log(2)
    return min(1.0, 2 * float(np.exp(logs).sum()))


def _bootstrap_means(values_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the mean of each of many draws of N values with replacement, [B]."""
    count, generator = len(values_N), np.random.default_rng(seed)
    found, counts = np.unique(values_N, return_counts=True)  # few: how many of each are drawn is all that matters
    drawn = generator.multinomial(count, counts / count, size=_RESAMPLES)
    return drawn @ found / count
