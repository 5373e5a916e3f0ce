"""The tasks `knn` and `logistic` for lists of labels, that is for samples that belong to any number of classes. Each
class has its own scores of the held-out samples; the metric is the mean of the classes' average precisions (mAP).

Shapes: N training samples, M held-out samples, R of them on this rank, L different lists of labels, C classes, D width,
V different scores, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.data import Corpus
from m3ae_fast.data.label_lists import LabelledLists, list_corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.evaluation.baselines import MODEL
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.neighbours import nearest
from m3ae_fast.evaluation.resampling import Resampled, bootstrap_weights, compared

# Returns the scores of this rank's queries, [R, C], given the features of the training samples, those of the queries,
# and whether each training sample belongs to each class, bool [N, C]. Every rank calls it.
Score = Callable[[FeatureBank, FeatureBank, Tensor], Tensor]
_RESAMPLES = 200  # number of bootstrap samples


def run(job: Job, score: Score) -> dict[str, Any]:
    """Run a task and return its result. `score`: the classifier of the task. Raises UserError if a sample has no list
    of labels, and the errors of `Job.open`."""
    train = _labelled(job, job.corpora[0], None)
    val = _labelled(job, job.corpora[1], train.classes)
    encoded = job.encode_with_baselines(train.corpus, val.corpus)
    bank, queries = encoded[MODEL]
    truth_NC, truth_MC = (part.classes_LC[each.labels] for part, each in ((train, bank), (val, queries)))
    scores = {
        name: own_queries.complete(score(own_bank, own_queries, truth_NC)).numpy()
        for name, (own_bank, own_queries) in encoded.items()
    }
    job.keep(_columns(queries.keys, truth_MC, scores[MODEL], train.classes))
    result = measured(truth_MC.numpy(), scores, truth_NC.any(0).numpy(), train.classes, job.config.run.seed)
    return result | {
        "train_samples": len(bank.keys),
        "val_samples": len(queries.keys),
        "skipped": len(bank.skipped) + len(queries.skipped),
    }


def _labelled(job: Job, corpus: Corpus, classes: Classes | None) -> LabelledLists:
    found = list_corpus(corpus, job.options.labels, classes, progress=job.ranks.is_main)
    job.print(f"{found.corpus.samples:,} samples with lists of labels, {len(found.classes):,} classes")
    if found.unknown:
        job.print(f"note: {found.unknown:,} labels that occur in --val have no training samples, and are left out")
    return found


def neighbour_scores(bank: FeatureBank, queries: FeatureBank, truth_NC: Tensor, k: int, temperature: float) -> Tensor:
    """Return the weighted fraction of the k nearest training samples that belong to each class, for this rank's
    queries: float32 [R, C], on the CPU. `truth_NC`: whether a training sample belongs to a class. Every rank must call
    it."""
    similarity_RK, number_RK = nearest(bank, queries, k)
    weights_RK = (similarity_RK.double() / temperature).softmax(1)
    scores = [(weights_K[:, None] * truth_NC[number_K]).sum(0) for weights_K, number_K in zip(weights_RK, number_RK)]
    return torch.stack(scores).float() if scores else torch.empty(0, truth_NC.shape[1])


def measured(
    truth_MC: np.ndarray, scores: Mapping[str, np.ndarray], known_C: np.ndarray, classes: Classes, seed: int
) -> dict[str, Any]:
    """Return the entries of result.json. The mAP is the mean over the classes that occur in both the training and the
    held-out samples. The model is compared with the baselines and with uninformative scores. Standard errors and the
    intervals of the differences are computed by a bootstrap over samples. The average precision of uninformative
    scores is the fraction of the samples that belong to the class.

    Args:
        truth_MC: whether a held-out sample belongs to a class.
        scores: scores of the held-out samples, [M, C]; the keys are MODEL and the names of the baselines.
        known_C: whether a class occurs in the training samples.
        classes: labels by class id.
        seed: random seed of the bootstrap.

    Raises:
        UserError: no class occurs in both the training and the held-out samples.
    """
    counted = np.flatnonzero(truth_MC.any(0) & known_C).tolist()
    if not counted:
        raise UserError("--val: no readable sample has a label that also occurs in a readable training sample")
    samples = len(truth_MC)
    weights_BM = bootstrap_weights(np.arange(samples), _RESAMPLES, seed)
    weights_BM = weights_BM[(weights_BM @ truth_MC[:, counted]).any(1)]  # a bootstrap sample may have no positives
    of_class = {
        name: np.array([average_precisions(truth_MC[:, c], scores_MC[:, c], weights_BM) for c in counted])
        for name, scores_MC in scores.items()
    }
    missing_CB = np.isnan(of_class[MODEL])
    chance_CB = np.where(missing_CB, np.nan, (truth_MC[:, counted].T @ weights_BM.T) / samples)
    found = {name: Resampled(np.nanmean(found_CB, 0)) for name, found_CB in of_class.items()}
    chance = Resampled(np.nanmean(chance_CB, 0))
    return {
        **found[MODEL].entries("map"),
        "chance_map": chance.value,
        "classes": len(counted),
        "per_class": [
            {
                "class": classes[c],
                "samples": int(truth_MC[:, c].sum()),
                "average_precision": float(of_class[MODEL][row, 0]),
            }
            for row, c in enumerate(counted)
        ],
        **compared("map", "mAP", found, chance, "chance", "random scores"),
    }


def average_precisions(truth_M: np.ndarray, scores_M: np.ndarray, weights_BM: np.ndarray) -> np.ndarray:
    """Return the average precision of a class for each weighting of the samples, [B]. Each distinct score is used as a
    threshold, and the precision at this threshold is multiplied by the increase in recall from the next higher
    threshold; the average precision is the sum of these products. It is NaN if no sample of the class has a positive
    weight. `weights_BM`: integer weights of the samples."""
    order_M = np.argsort(-scores_M, kind="stable")
    ends_V = np.flatnonzero(np.append(np.diff(scores_M[order_M]) != 0, True))
    weights_BM = weights_BM[:, order_M]
    taken_BV = weights_BM.cumsum(1)[:, ends_V]
    right_BV = (weights_BM * truth_M[order_M]).cumsum(1)[:, ends_V]
    added_BV = np.diff(right_BV, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_BV = np.where(taken_BV > 0, right_BV / taken_BV, 0.0)
        return (precision_BV * added_BV).sum(1) / right_BV[:, -1]


def _columns(keys: list[str], truth_MC: Tensor, scores_MC: np.ndarray, classes: Classes) -> dict[str, Any]:
    """Return the columns of the predictions: keys, the labels of each sample, and its scores in the order of
    `classes`."""
    labels = [[str(classes[number]) for number in row.nonzero()[:, 0].tolist()] for row in truth_MC]
    return {"key": keys, "labels": labels, "scores": scores_MC}
