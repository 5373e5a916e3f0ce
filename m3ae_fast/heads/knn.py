"""k-nearest-neighbour classification of frozen features.

The voting scheme is that of Wu et al. (arXiv 1805.01978) and DINO: each of the k training samples with the highest
cosine similarity s votes for its classes with weight exp(s / temperature).

Shapes: N training samples, R samples to classify on this rank, K neighbours, C classes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from m3ae_fast.config import USUAL_K, KnnConfig
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.hyperparameter_choice import split
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.predictions import Predictions

NUMBERS = (1, USUAL_K)  # numbers of neighbours that are tried if `knn.k` is null
_MOST_HELD_OUT = 10_000  # maximum number of held-out samples on which NUMBERS are tried


def knn_scores(bank: FeatureBank, queries: FeatureBank, classes: int, k: int, temperature: float) -> Tensor:
    """Return the sum of the votes for each class by the k nearest training samples of each of this rank's queries:
    float32 [R, C], on the CPU. The vote of the nearest sample has the weight 1. For lists of labels, the weights of the
    k votes have the sum 1 instead. Every rank must call it."""
    similarity_RK, number_RK = nearest(bank, queries, k)
    # Weights are relative to the weight of the nearest sample, which avoids overflow at low temperatures.
    weights_RK = ((similarity_RK.double() - similarity_RK[:, :1]) / temperature).exp()
    if bank.has_lists:
        shares_RK = weights_RK / weights_RK.sum(1, keepdim=True)
        return sum(s_R[:, None] * bank.labels[number_R] for s_R, number_R in zip(shares_RK.T, number_RK.T)).float()
    votes_RC = weights_RK.new_zeros(len(weights_RK), classes).scatter_add(1, bank.labels[number_RK], weights_RK)
    return votes_RC.float()


def knn_predictions(bank: FeatureBank, queries: FeatureBank, classes: int, config: KnnConfig) -> Predictions:
    """Return the k-NN predictions of all queries, with neighbours from `bank`. The predictions' `chosen` contains the
    number of neighbours, "k", and whether features were standardised, "standardised". If `config.k` is null, each of
    NUMBERS is tried with and without standardisation: a tenth of the samples of `bank` is classified with neighbours
    from the other samples, and the combination with the highest quality is used. In a tie, a combination without
    standardisation is preferred and, if there are several, the one with USUAL_K. If there are fewer than ten samples,
    features are not standardised, and the number is USUAL_K. Every rank must call it."""
    k, standardised = (config.k, False) if config.k else _chosen(bank, classes, config.temperature)
    found = _predictions(bank, queries, classes, k, standardised, config.temperature)
    return replace(found, chosen={"k": min(k, len(bank.keys)), "standardised": standardised})


def _predictions(
    bank: FeatureBank, queries: FeatureBank, classes: int, k: int, standardised: bool, temperature: float
) -> Predictions:
    """Return the predictions that follow from the votes of `knn_scores`. `standardised`: whether features are
    standardised, with the mean and the standard deviation of the features of `bank`."""
    if standardised:
        standard = bank.measured()
        bank, queries = replace(bank, standard=standard), replace(queries, standard=standard)
    return queries.predictions(knn_scores(bank, queries, classes, k, temperature), votes=True)


def _chosen(bank: FeatureBank, classes: int, temperature: float) -> tuple[int, bool]:
    """Return the number of neighbours, and whether features are standardised."""
    train, held_out = (bank.rows(numbers) for numbers in split(bank, _MOST_HELD_OUT))
    if not held_out.keys:
        return USUAL_K, False
    quality = {}
    for k, standardised in ((k, standardised) for standardised in (False, True) for k in NUMBERS):
        quality[k, standardised] = _predictions(train, held_out, classes, k, standardised, temperature).quality
    return max(quality, key=lambda each: (quality[each], not each[1], each[0] == USUAL_K))
