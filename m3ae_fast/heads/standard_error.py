"""Standard errors of accuracies and, by the bootstrap, of metrics of a whole dataset, such as mAP or mIoU.

Samples with the same image form a cluster, because a model gives copies of an image the same features. The standard
errors are the cluster-robust ones of a mean (Liang and Zeger 1986, "Longitudinal data analysis using generalized linear
models"; for evaluations: Miller 2024, arXiv 2411.00640). If no image occurs twice, these are the usual formulas for
independent samples.

Shapes: N samples, C clusters, B weightings of the samples. In the first weighting, all weights are 1; each of the
others is a bootstrap sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ERROR = "_se"  # suffix of a metric's name that denotes its standard error
_SAME = 1e-12  # largest difference between values that differ only by rounding


def image_clusters(hashes: Sequence[str]) -> np.ndarray:
    """Return the cluster of each sample, int64 [N], numbered in the order of first occurrence: samples whose images
    have the same hash are in one cluster. A sample without a hash ("") is alone in its cluster."""
    seen: dict[Any, int] = {}
    keys = (image or number for number, image in enumerate(hashes))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def effective_samples(clusters_N: np.ndarray) -> float:
    """Return the effective number of samples if all samples of a cluster have the same result: N^2 / (sum of squared
    cluster sizes) (Kish 1965, "Survey Sampling")."""
    sizes_C = np.bincount(clusters_N)
    return len(clusters_N) ** 2 / float(sizes_C @ sizes_C)


def error_of_accuracy(correct_N: np.ndarray, clusters_N: np.ndarray | None = None) -> float:
    """Return the cluster-robust standard error of an accuracy.

    Args:
        correct_N: whether each sample is classified correctly, bool, or the fraction of trials in which this is so.
        clusters_N: cluster of each sample, int64; None: every sample is its own cluster.
    """
    clusters_N = np.arange(len(correct_N)) if clusters_N is None else clusters_N
    mean = float(correct_N.mean())
    if not 0 < mean < 1 or not clusters_N.any():  # in both cases, all residuals_C would be 0
        return standard_error(mean, effective_samples(clusters_N))
    residuals_C = np.bincount(clusters_N, correct_N - mean)
    return math.sqrt(residuals_C @ residuals_C) / len(correct_N)


def standard_error(accuracy: float, samples: float) -> float:
    """Return the standard error of an accuracy on this number of samples. If the accuracy is 0 or 1, it is replaced
    by Laplace's estimate, so that the standard error is not 0."""
    likely = accuracy if 0 < accuracy < 1 else (accuracy * samples + 1) / (samples + 2)
    return math.sqrt(likely * (1 - likely) / samples)


def bootstrap_weights(clusters_N: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the weights of the samples, int64 [1 + resamples, N]: 1 in the first row, for the original samples, and
    the weights of a bootstrap sample of their clusters in each further row. `clusters_N`: see `image_clusters`."""
    clusters = int(clusters_N.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return np.concatenate((np.ones((1, len(clusters_N)), np.int64), drawn[:, clusters_N]))


@dataclass(frozen=True)
class Resampled:
    """A metric for each weighting of the same samples."""

    values_B: np.ndarray  # float64

    @property
    def value(self) -> float:
        """Return the metric of the original samples."""
        return float(self.values_B[0])

    @property
    def varies(self) -> bool:
        """Return whether the metric differs between bootstrap samples. If it does not, for example because there is
        only one sample, its standard error cannot be estimated."""
        return len(self.values_B) > 2 and bool(np.ptp(self.values_B[1:]) > _SAME)

    def entries(self, name: str) -> dict[str, float]:
        """Return the metric and, if it can be estimated, its standard error as entries of result.json. `name`: name of
        the metric."""
        error = {f"{name}{ERROR}": float(self.values_B[1:].std(ddof=1))} if self.varies else {}
        return {name: self.value} | error
