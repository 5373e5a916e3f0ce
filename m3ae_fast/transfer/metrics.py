"""Accuracies of classifiers.

Shapes: N samples, C classes, K best classes.
"""

from __future__ import annotations

from torch import Tensor

from m3ae_fast.errors import UserError


def best_classes(scores_NC: Tensor) -> Tensor:
    """Return int64 [N, K]: the class of the highest score or, of more than 5 classes, those of the 5 highest, best
    first.

    Raises UserError where a score is not finite: NaN would be the highest.
    """
    bad = int((~scores_NC.isfinite()).any(1).sum())
    if bad:
        raise UserError(
            f"{bad:,} of {len(scores_NC):,} samples have scores that are not finite: the classifier has diverged, or "
            "is damaged; train it again, with a lower peak_lr"
        )
    return scores_NC.topk(5 if scores_NC.shape[1] > 5 else 1, dim=1).indices


def topk_accuracy(best_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return accuracies from 0 to 1: "top1" and, if K = 5, "top5"."""
    correct_NK = best_NK == labels_N[:, None]
    return {f"top{k}": correct_NK[:, :k].any(1).double().mean().item() for k in sorted({1, best_NK.shape[1]})}
