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

from m3ae_fast.base.progress import track
from m3ae_fast.config import KnnConfig
from m3ae_fast.data import Corpus
from m3ae_fast.drawing.figures import GREEN, RED, draw_sheet
from m3ae_fast.evaluation.encoding import Features
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.predictions import Predictions

_AT_A_TIME = 512
_SHOWN, _NEIGHBOURS = 8, 7  # samples drawn, and neighbours of each


def knn_scores(
    features_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Return the votes of the k nearest of N samples, with int64 ids `labels_N`, for each class: float32 [M, C]."""
    bank_ND = F.normalize(features_ND, dim=1)
    votes = []
    for queries_QD in track(F.normalize(queries_MD, dim=1).split(_AT_A_TIME), "k-NN"):
        similarity_QK, neighbours_QK = (queries_QD @ bank_ND.T).topk(min(k, len(bank_ND)), dim=1)
        # exp of what is below the nearest: the same order of classes, and no overflow at low temperatures
        weights_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
        votes_QC = weights_QK.new_zeros(len(queries_QD), classes).scatter_add(1, labels_N[neighbours_QK], weights_QK)
        votes.append(votes_QC)
    return torch.cat(votes).float()


def knn_predictions(bank: Features, queries: Features, classes: int, config: KnnConfig) -> Predictions:
    """Return what the neighbours in `bank` make of the queries. Raises UserError where a feature is not finite."""
    scores_MC = knn_scores(bank.features_ND, bank.labels, queries.features_ND, classes, config.k, config.temperature)
    return Predictions.of(queries.keys, queries.labels, scores_MC, votes=True)


def run(job: Job) -> dict[str, Any]:
    train, val, classes = job.open_labelled()
    bank, queries = job.encode(train, "encoding train"), job.encode(val, "encoding val")
    predictions = knn_predictions(bank, queries, len(classes), job.config.knn)
    job.keep(predictions.columns(classes))

    job.pictures.append(lambda: _draw_neighbours(job, (train, val), (bank, queries), predictions.best_NK[:, 0]))
    return predictions.accuracies() | {
        "k": min(job.config.knn.k, len(bank.keys)),
        "classes": len(classes),
        "train_samples": len(bank.keys),
        "val_samples": len(queries.keys),
        "skipped": len(bank.skipped) + len(queries.skipped),
    }


def _draw_neighbours(
    job: Job, corpora: tuple[Corpus, Corpus], features: tuple[Features, Features], predicted_M: Tensor
) -> None:
    """Draw some samples evenly, and the training samples most like each; green where they are of its class."""
    bank, queries = features
    rows_Q = torch.arange(min(_SHOWN, len(queries.keys))) * len(queries.keys) // min(_SHOWN, len(queries.keys))
    similarity_QN = F.normalize(queries.features_ND[rows_Q], dim=1) @ F.normalize(bank.features_ND, dim=1).T
    nearest_QK = similarity_QN.topk(min(_NEIGHBOURS, len(bank.keys)), dim=1).indices
    keys = [bank.keys[row] for row in nearest_QK.flatten().tolist()], [queries.keys[row] for row in rows_Q.tolist()]
    neighbours, asked = (job.samples(corpus, names) for corpus, names in zip(corpora, keys))
    sheet = []
    for row, nearest_K in zip(rows_Q.tolist(), nearest_QK.tolist()):
        label, predicted = int(queries.labels[row]), int(predicted_M[row])
        right = GREEN if label == predicted else RED
        text = job.names[label] + ("" if label == predicted else f", taken for {job.names[predicted]}")
        cells = [job.cell(asked.get(queries.keys[row]), text, right)]
        for other in nearest_K:
            own = int(bank.labels[other])
            cells.append(job.cell(neighbours.get(bank.keys[other]), job.names[own], GREEN if own == label else RED))
        sheet.append(cells)
    draw_sheet(job.out / "neighbours.png", sheet, ("sample", "nearest training samples"))
