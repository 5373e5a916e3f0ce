"""Metrics of a whole dataset, such as mAP or mIoU, with errors and tests that are computed by the bootstrap over
samples.

Shapes: B weightings of the held-out samples. In the first weighting, all weights are 1; each of the others is a
bootstrap sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3ae_fast.evaluation.baselines import MODEL, WARNINGS, Baseline, baseline_entries, not_better, warning
from m3ae_fast.evaluation.significance import Difference, middle
from m3ae_fast.heads.standard_error import ERROR

_SAME = 1e-12  # largest difference between values that differ only by rounding


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

    def minus(self, other: Resampled) -> Difference | None:
        """Return the difference from another metric of the same samples; None if its interval cannot be estimated. The
        interval is computed from bootstrap samples, whose bias is subtracted. For example, repeated samples raise an
        average precision, so all values of bootstrap samples may be higher than the value of the original samples."""
        if not (self.varies or other.varies):
            return None
        value, apart_B = self.value - other.value, self.values_B[1:] - other.values_B[1:]
        return Difference(value, *middle(apart_B - apart_B.mean() + value))


def compared(
    name: str, title: str, found: Mapping[str, Resampled], chance: Resampled, chance_name: str, rule: str
) -> dict[str, Any]:
    """Return the entries of result.json that compare a model with baselines: "verdict", "baselines" and, if the model
    is not significantly better than each of them or the errors cannot be estimated, WARNINGS.

    Args:
        name: name of the metric in the result.
        title: name of the metric for display.
        found: the metric of the model and of each baseline; the keys are MODEL and the names of the baselines.
        chance: the metric of predictions that need no model.
        chance_name: name of these predictions in the warning.
        rule: description of these predictions in the verdict.
    """
    model = found[MODEL]
    result = baseline_entries(
        {other: Baseline(each.entries(name), model.minus(each)) for other, each in found.items() if other != MODEL}
    )
    apart = model.minus(chance)
    if apart is None:
        text = f"the standard error of {title} cannot be estimated from these held-out samples; use more of them"
        return result | {WARNINGS: [text]}
    result["verdict"] = f"{title} {model.value:.1%}; difference from {rule} {apart.points()}"
    others = ({} if apart.is_better else {chance_name: chance.value}) | not_better(result, name)
    text = warning(title, model.value, others)
    return result | ({WARNINGS: [text]} if text else {})
