"""Accuracies of classifiers.

Shapes: N samples, C classes, K best classes.
"""

from __future__ import annotations

from torch import Tensor


def accuracies(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Shares of the samples, from 0 to 1, whose label has the highest score, "top1", and, of more than 5 classes,
    one of the 5 highest, "top5".

    Args:
        scores_NC: floating; the higher, the likelier.
        labels_N: int64 class ids.
    """
    shares = {}
    for k in (1, 5):
        if k == 1 or scores_NC.shape[1] > k:
            best_NK = scores_NC.topk(k, dim=1).indices
            shares[f"top{k}"] = (best_NK == labels_N[:, None]).any(1).double().mean().item()
    return shares
