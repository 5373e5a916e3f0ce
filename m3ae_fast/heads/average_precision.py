"""Average precision of the scores of samples that belong to any number of classes.

Shapes: N samples, C classes, V different scores of a class, B weightings of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3ae_fast.heads.standard_error import Resampled, bootstrap_weights, image_clusters

_RESAMPLES = 200  # number of bootstrap samples


def average_precisions(truth_N: np.ndarray, scores_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the average precision of a class for each weighting of the samples, [B]. Each distinct score is used as a
    threshold, and the precision at this threshold is multiplied by the increase in recall from the next higher
    threshold; the average precision is the sum of these products. It is NaN if no sample of the class has a positive
    weight. `weights_BN`: integer weights of the samples."""
    order_N = np.argsort(-scores_N, kind="stable")
    ends_V = np.flatnonzero(np.append(np.diff(scores_N[order_N]) != 0, True))
    weights_BN = weights_BN[:, order_N]
    taken_BV = weights_BN.cumsum(1)[:, ends_V]
    right_BV = (weights_BN * truth_N[order_N]).cumsum(1)[:, ends_V]
    added_BV = np.diff(right_BV, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_BV = np.where(taken_BV > 0, right_BV / taken_BV, 0.0)
        return (precision_BV * added_BV).sum(1) / right_BV[:, -1]


def mean_average_precisions(
    truth_NC: np.ndarray, scores_NC: np.ndarray, weights_BN: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean average precision (mAP) over the classes that occur, for each weighting of the samples, [B]; 0 if
    no class occurs.

    Args:
        truth_NC: whether a sample belongs to a class, bool.
        scores_NC: scores of the samples.
        weights_BN: integer weights of the samples. In each weighting, a sample of at least one class must have a
            positive weight. None: one weighting, in which all weights are 1.
    """
    weights_BN = np.ones((1, len(truth_NC)), np.int64) if weights_BN is None else weights_BN
    occurring = np.flatnonzero(truth_NC.any(0))
    of_class = [average_precisions(truth_NC[:, c], scores_NC[:, c], weights_BN) for c in occurring]
    return np.nanmean(of_class, 0) if of_class else np.zeros(len(weights_BN))


def resampled(truth_NC: np.ndarray, scores_NC: np.ndarray, hashes: Sequence[str] = ()) -> Resampled:
    """Return the mAP of the scores on the given samples and on bootstrap samples, which are drawn by image. The
    bootstrap samples do not depend on the scores.

    Args:
        truth_NC, scores_NC: as for `mean_average_precisions`.
        hashes: hash of each sample's image; the bootstrap draws samples with equal hashes together. Empty: all images
            differ.
    """
    weights_BN = bootstrap_weights(image_clusters(hashes or [""] * len(truth_NC)), _RESAMPLES, seed=0)
    has_positives_B = (weights_BN @ truth_NC).any(1)
    has_positives_B[0] = True  # the metric of the original samples is always known
    return Resampled(mean_average_precisions(truth_NC, scores_NC, weights_BN[has_positives_B]))
