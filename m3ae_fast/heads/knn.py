"""k-nearest-neighbour classification of frozen features.

The voting scheme is that of Wu et al. (arXiv 1805.01978) and DINO: each of the k training samples with the highest
cosine similarity s votes for its class with weight exp(s / temperature).

Shapes: N training samples, R samples to classify on this rank, K neighbours, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from m3ae_fast.config import USUAL_K, KnnConfig
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.hyperparameter_choice import split
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.predictions import Predictions

NUMBERS = (1, USUAL_K)  # numbers of neighbours that are tried if `knn.k` is null
_MOST_HELD_OUT = 10_000  # maximum number of samples on which they are tried


def knn_scores(bank: FeatureBank, queries: FeatureBank, classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes of the k nearest training samples for each class, for this rank's queries: float32 [R, C], on
    the CPU, in units of the vote of the nearest sample. Every rank must call it."""
    similarity_RK, number_RK = nearest(bank, queries, k)
    # Weights are relative to the weight of the nearest sample, which avoids overflow at low temperatures.
    weights_RK = ((similarity_RK.double() - similarity_RK[:, :1]) / temperature).exp()
    votes_RC = weights_RK.new_zeros(len(weights_RK), classes).scatter_add(1, bank.labels[number_RK], weights_RK)
    return votes_RC.float()


class Search(NamedTuple):
    """How the neighbours are found."""

    k: int = USUAL_K  # number of neighbours of a query
    standardised: bool = False  # whether features are compared after standardisation

    def entries(self) -> dict[str, float]:
        """Return the entries of this choice in result.json."""
        return self._asdict()


def knn_predictions(
    bank: FeatureBank, queries: FeatureBank, classes: int, config: KnnConfig
) -> tuple[Predictions, Search]:
    """Return the k-NN predictions of all queries, with neighbours from `bank`, and how the neighbours were found. If
    `config.k` is null, this is the choice of a number from NUMBERS, and of standardised features or not, that has the
    highest accuracy on a tenth of the samples of `bank`, with neighbours from the others. In a tie, and if there are
    fewer than ten samples, features are not standardised, and the number is USUAL_K. Every rank must call it."""
    search = Search(config.k) if config.k else _chosen(bank, classes, config.temperature)
    scores_RC = _scores(bank, queries, classes, search, config.temperature)
    return queries.predictions(scores_RC, votes=True), search._replace(k=min(search.k, len(bank.keys)))


def _scores(bank: FeatureBank, queries: FeatureBank, classes: int, search: Search, temperature: float) -> Tensor:
    """Return the votes as `knn_scores` does. The standardisation is that of the features of `bank`."""
    if search.standardised:
        standard = bank.measured()
        bank, queries = replace(bank, standard=standard), replace(queries, standard=standard)
    return knn_scores(bank, queries, classes, search.k, temperature)


def _chosen(bank: FeatureBank, classes: int, temperature: float) -> Search:
    parts = split(bank, _MOST_HELD_OUT)
    if not parts.held_out:
        return Search()
    train, held_out = bank.rows(parts.train), bank.rows(parts.held_out)
    top1 = {}
    for search in (Search(k, standardised) for standardised in (False, True) for k in NUMBERS):
        scores_RC = _scores(train, held_out, classes, search, temperature)
        top1[search] = held_out.predictions(scores_RC, votes=True).accuracies()["top1"]
    return max(top1, key=lambda search: (top1[search], not search.standardised, search.k == USUAL_K))
