"""Means over seeds, and differences between two encoders on the same samples, with their standard errors.

Each seed holds out different emoji, so that all seeds together test each emoji once; clothes are tested with every
seed. Images that belong together (both vendors' images of an emoji) count as one sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lab.study.measure import Labels

Seeds = Mapping[int, Mapping[str, float]]  # by seed and key: how often the sample was classified correctly, from 0 to 1


class Estimate(NamedTuple):
    """A mean, from -1 to 1, and its standard error over samples and seeds."""

    mean: float
    error: float
    seeds: int
    samples: int  # number of independent samples

    def percent(self, sign: str = "") -> str:
        """Return the mean and its standard error in percent, as text. `sign`: "+" to show the sign of positive means,
        too."""
        return f"{100 * self.mean:{sign}.1f} ± {100 * self.error:.1f}"


def cell(estimate: Estimate | None, sign: str = "") -> str:
    """Return the cell of a table: an estimate in percent and its number of seeds, or "-" if there is no estimate.
    `sign`: as for `Estimate.percent`."""
    return "-" if estimate is None else f"{estimate.percent(sign)} ({estimate.seeds})"


def accuracy(seeds: Seeds, labels: Labels) -> Estimate:
    """Return the accuracy of an encoder."""
    return _estimate(seeds, labels)


def difference(first: Seeds, second: Seeds, labels: Labels) -> Estimate | None:
    """Return the difference between the accuracies, first minus second, over the seeds and samples that both have; None
    if there are none."""
    apart = {
        seed: {key: first[seed][key] - second[seed][key] for key in first[seed] if key in second[seed]}
        for seed in first
        if seed in second
    }
    return _estimate(apart, labels) if any(apart.values()) else None


def _estimate(seeds: Seeds, labels: Labels) -> Estimate:
    by_sample: defaultdict[str, list[float]] = defaultdict(list)
    for own in seeds.values():
        for key, value in own.items():
            by_sample[labels[key]["emoji"]].append(value)
    of_samples = standard_error([np.mean(values) for values in by_sample.values()])
    of_seeds = standard_error([np.mean([*own.values()]) for own in seeds.values()])
    mean = float(np.mean([value for own in seeds.values() for value in own.values()]))
    return Estimate(mean, math.hypot(of_samples, of_seeds), len(seeds), len(by_sample))


def standard_error(values: Iterable[np.floating]) -> float:
    """Return the standard error of the mean of several values; 0 for a single value, because nothing is known about its
    variation."""
    values = [*values]
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
