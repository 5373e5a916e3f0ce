"""k-nearest-neighbour classification of frozen features: no training, one pass over the data.

The voting scheme is that of Wu et al. (arXiv 1805.01978) and DINO: each of the k training samples with the highest
cosine similarity s votes for its class with weight exp(s / temperature).

Shapes: N training samples, M samples to classify, R of them on this rank, K neighbours, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from m3ae_fast.config import USUAL_K, KnnConfig
from m3ae_fast.data import Corpus
from m3ae_fast.drawing.figures import GREEN, RED, draw_sheet
from m3ae_fast.evaluation import multilabel
from m3ae_fast.evaluation.baselines import MODEL, accuracy_entries
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.hyperparameter_choice import split
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.neighbours import nearest
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.tasks import Knn

NUMBERS = (1, USUAL_K)  # numbers of neighbours that are tried if `knn.k` is null
_MOST_HELD_OUT = 10_000  # maximum number of samples on which they are tried
_SHOWN, _NEIGHBOURS = 8, 7  # number of queries in the figure, and of neighbours per query


def knn_scores(bank: FeatureBank, queries: FeatureBank, classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes of the k nearest training samples for each class, for this rank's queries: float32 [R, C], on
    the CPU, in units of the vote of the nearest sample. Every rank must call it."""
    similarity_RK, number_RK = nearest(bank, queries, k)
    # Weights are relative to the weight of the nearest sample, which avoids overflow at low temperatures.
    weights_RK = ((similarity_RK.double() - similarity_RK[:, :1]) / temperature).exp()
    votes_RC = weights_RK.new_zeros(len(weights_RK), classes).scatter_add(1, bank.labels[number_RK], weights_RK)
    return votes_RC.float()


def knn_predictions(
    bank: FeatureBank, queries: FeatureBank, classes: int, config: KnnConfig
) -> tuple[Predictions, int]:
    """Return the k-NN predictions of all queries, with neighbours from `bank`, and the number of neighbours of a query.
    If `config.k` is null, this number is the one of NUMBERS with the highest accuracy on a tenth of the samples of
    `bank`, with neighbours from the others; in a tie, or if there are fewer than ten samples, it is USUAL_K. Every rank
    must call it."""
    k = config.k or _chosen_k(bank, classes, config.temperature)
    scores_RC = knn_scores(bank, queries, classes, k, config.temperature)
    return queries.predictions(scores_RC, votes=True), min(k, len(bank.keys))


def _chosen_k(bank: FeatureBank, classes: int, temperature: float) -> int:
    parts = split(bank, _MOST_HELD_OUT)
    if not parts.held_out:
        return USUAL_K
    train, held_out = bank.rows(parts.train), bank.rows(parts.held_out)
    top1 = {}
    for k in NUMBERS:
        scores_RC = knn_scores(train, held_out, classes, k, temperature)
        top1[k] = held_out.predictions(scores_RC, votes=True).accuracies()["top1"]
    return max(top1, key=lambda k: (top1[k], k == USUAL_K))


def run(job: Job[Knn]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError as `Job.open_labelled` and `encode_corpus` do."""
    config = job.config.knn
    if job.has_lists:
        return multilabel.run(
            job, partial(multilabel.neighbour_scores, k=config.fixed_k, temperature=config.temperature)
        )
    train, val, classes = job.open_labelled()
    encoded = job.encode_for_classes(train, val)
    found, chosen = {}, {}
    for name, banks in encoded.items():
        found[name], k = knn_predictions(*banks, len(classes), config)
        chosen[name] = {"k": k, **job.chosen_pool(name)}
    job.keep(found[MODEL].columns(classes))
    predicted_M, (bank, queries) = found[MODEL].best_NK[:, 0], encoded[MODEL]
    shown = _shown(bank, queries)

    job.pictures.append(lambda: _draw_neighbours(job, (train, val), (bank, queries), shown, predicted_M))
    return accuracy_entries(found, chosen) | {
        "classes": len(classes),
        "train_samples": len(bank.keys),
        "val_samples": len(queries.keys),
        "skipped": len(bank.skipped) + len(queries.skipped),
    }


def _shown(bank: FeatureBank, queries: FeatureBank) -> dict[int, list[int]]:
    """Return the numbers of the training samples nearest to some evenly spaced queries, keyed by the query's number.
    Every rank must call it."""
    count = min(_SHOWN, len(queries.keys))
    rows = [number * len(queries.keys) // count for number in range(count)]
    some = queries.rows(rows)
    return dict(zip(rows, some.complete(nearest(bank, some, _NEIGHBOURS).number_QK).tolist()))


def _draw_neighbours(
    job: Job,
    corpora: tuple[Corpus, Corpus],
    features: tuple[FeatureBank, FeatureBank],
    shown: Mapping[int, Sequence[int]],
    predicted_M: Tensor,
) -> None:
    """Plot some queries with the training samples that are most similar to each. The text of a training sample is green
    if it has the query's class. `shown`: numbers of the training samples, keyed by the query's number."""
    bank, queries = features
    keys = [bank.keys[row] for rows in shown.values() for row in rows], [queries.keys[row] for row in shown]
    neighbours, shown_queries = (job.samples(corpus, names) for corpus, names in zip(corpora, keys))
    sheet = []
    for row, nearest_K in shown.items():
        label, predicted = int(queries.labels[row]), int(predicted_M[row])
        right = GREEN if label == predicted else RED
        text = job.names[label] + ("" if label == predicted else f", predicted as {job.names[predicted]}")
        cells = [job.cell(shown_queries.get(queries.keys[row]), text, right)]
        for other in nearest_K:
            own = int(bank.labels[other])
            cells.append(job.cell(neighbours.get(bank.keys[other]), job.names[own], GREEN if own == label else RED))
        sheet.append(cells)
    draw_sheet(job.out / "neighbours.png", sheet, ("held-out sample", "nearest training samples"))
