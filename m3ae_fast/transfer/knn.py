"""k-nearest-neighbour classification of frozen features: no training, one pass over the data.

The votes are those of Wu et al. (arXiv 1805.01978) and DINO: each of the k training samples of the highest cosine
similarity s votes for its class with weight exp(s / temperature).

Shapes: N training samples, M samples to classify, Q of them at a time, K neighbours, C classes, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.metrics import accuracies

_AT_A_TIME = 512


def knn_scores(
    features_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Votes for each class.

    Args:
        features_ND, labels_N: floating, and int64 ids, of the training samples.
        queries_MD: floating; what to classify.
        classes: C.
        k: neighbours that vote; at most N do.
        temperature: of the votes.

    Returns:
        float32 [M, C].
    """
    bank_ND = F.normalize(features_ND, dim=1)
    votes = []
    for queries_QD in F.normalize(queries_MD, dim=1).split(_AT_A_TIME):
        similarity_QK, neighbours_QK = (queries_QD @ bank_ND.T).topk(min(k, len(bank_ND)), dim=1)
        # exp of what is below the nearest: the same order of classes, and no overflow at low temperatures
        weights_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
        votes_QC = weights_QK.new_zeros(len(queries_QD), classes).scatter_add(1, labels_N[neighbours_QK], weights_QK)
        votes.append(votes_QC)
    return torch.cat(votes).float()


def run(job: Job) -> dict[str, Any]:
    bank, queries, classes = job.encode_labelled()
    config = job.config.knn
    assert bank.labels_N is not None and queries.labels_N is not None
    scores_MC = knn_scores(
        bank.features_ND, bank.labels_N, queries.features_ND, len(classes), config.k, config.temperature
    )
    return accuracies(scores_MC, queries.labels_N) | {
        "k": config.k,
        "classes": len(classes),
        "train_samples": len(bank.keys),
        "val_samples": len(queries.keys),
        "skipped": len(bank.skipped) + len(queries.skipped),
    }
