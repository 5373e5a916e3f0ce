"""Choice of an encoder's pooling by logistic regression on held-out training samples."""

from __future__ import annotations

from m3ae_fast.heads.encoding import key_digest
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.logistic_regression import Tried, try_strengths
from m3ae_fast.process.heartbeats import Heartbeats

MOST_SAMPLES = 5000  # maximum number of training samples with which the candidates are compared


def best_type(bank: FeatureBank, classes: int, heartbeats: Heartbeats) -> tuple[FeatureType, Tried | None]:
    """Return the type of pooled features with the highest quality on held-out samples (the accuracy or, for lists of
    labels, the mAP), and the logistic regressions on its features. If these were fitted to only some of the samples,
    None is returned in their place. In a tie, or if there are too few samples to hold some out, the first of the types
    is returned. Every rank must call it, and gets the same type.

    Args:
        bank: features of the training samples, of all types that are compared; patch tokens are ignored.
        classes: number of classes.
        heartbeats: heartbeats of this rank.
    """
    is_part = len(bank.keys) > MOST_SAMPLES
    if is_part:
        digests = [key_digest(key, "pool") for key in bank.keys]
        bank = bank.rows(sorted(sorted(range(len(digests)), key=digests.__getitem__)[:MOST_SAMPLES]))
    tried = {kind: try_strengths(bank.of(kind), classes, heartbeats) for kind in bank.types if not kind.is_tokens}
    quality = {kind: found.quality(bank.ranks) for kind, found in tried.items()}
    best = max(quality, key=quality.__getitem__)
    return best, None if is_part else tried[best]
