"""The tasks `knn` and `logistic` for lists of labels, that is, for samples that belong to any number of classes. Each
class has its own scores of the held-out samples; the metric is the mean of the classes' average precisions (mAP).

Shapes: N training samples, M held-out samples, R of them on this rank, L different lists of labels, C classes, D width,
V different scores, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.data import Corpus
from m3ae_fast.data.label_lists import LabelledLists, list_corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.evaluation.baselines import MODEL
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.resampling import Resampled, bootstrap_weights, compared
from m3ae_fast.evaluation.task_features import encode_with_baselines
from m3ae_fast.evaluation.tasks import WithGrid, WithLabels
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.predictions import IMAGE_HASH
from m3ae_fast.heads.standard_error import image_clusters

# A classifier: (features of the training samples, features of this rank's queries, bool [N, C]: whether each training
# sample belongs to each class) -> scores of the queries, [R, C]. Every rank calls it.
Score = Callable[[FeatureBank, FeatureBank, Tensor], Tensor]
_RESAMPLES = 200  # number of bootstrap samples
_CHANCE = "chance"  # name of uninformative scores


def run(job: Job[WithGrid], score: Score) -> dict[str, Any]:
    """Run a task and return its result. `score`: the classifier of the task. Raises UserError if there are options of a
    grid or a sample has no list of labels. Also raises the errors of `Job.open`."""
    if job.options.is_grid:
        raise UserError(
            f"labels {job.options.labels}: are lists, for which layers, pools and shots are not supported; leave these "
            "out"
        )
    train = _labelled(job, job.corpora[0], None)
    val = _labelled(job, job.corpora[1], train.classes)
    encoded = encode_with_baselines(job, train.corpus, val.corpus)
    bank, queries = encoded[MODEL]
    truth_NC, truth_MC = (part.classes_LC[each.labels] for part, each in ((train, bank), (val, queries)))
    scores = {
        name: own_queries.complete(score(own_bank, own_queries, truth_NC)).numpy()
        for name, (own_bank, own_queries) in encoded.items()
    }
    known_C, hashes = truth_NC.any(0).numpy(), queries.image_hashes
    result = measured(truth_MC.numpy(), scores, known_C, train.classes, job.config.run.seed, hashes)
    job.keep(_columns(queries, truth_MC.numpy() & known_C, scores[MODEL], train.classes))
    return result | {
        "train_samples": len(bank.keys),
        "val_samples": len(queries.keys),
        "skipped": len(bank.skipped) + len(queries.skipped),
    }


def _labelled(job: Job[WithLabels], corpus: Corpus, classes: Classes | None) -> LabelledLists:
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
    truth_MC: np.ndarray,
    scores: Mapping[str, np.ndarray],
    known_C: np.ndarray,
    classes: Classes,
    seed: int,
    hashes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the entries of result.json. The mAP is the mean over the classes that occur in both the training and the
    held-out samples. The model is compared with the baselines and with uninformative scores. Standard errors and the
    intervals of the differences are computed by a bootstrap over images. The average precision of uninformative scores
    is that of equal scores: the fraction of the samples that belong to the class.

    Args:
        truth_MC: whether a held-out sample belongs to a class.
        scores: scores of the held-out samples, [M, C]; the keys are MODEL and the names of the baselines.
        known_C: whether a class occurs in the training samples.
        classes: labels by class id.
        seed, hashes: as in `resampled`.

    Raises:
        UserError: no class occurs in both the training and the held-out samples.
    """
    counted = np.flatnonzero(truth_MC.any(0) & known_C).tolist()
    if not counted:
        raise UserError("--val: no readable sample has a label that also occurs in a readable training sample")
    even, own_MC, once_1M = np.zeros_like(scores[MODEL]), scores[MODEL], np.ones((1, len(truth_MC)), np.int64)
    found = resampled(truth_MC & known_C, {**scores, _CHANCE: even}, seed, hashes)
    chance = found.pop(_CHANCE)
    return {
        **found[MODEL].entries("map"),
        "chance_map": chance.value,
        "classes": len(counted),
        "per_class": [
            {
                "class": classes[c],
                "samples": int(truth_MC[:, c].sum()),
                "average_precision": float(average_precisions(truth_MC[:, c], own_MC[:, c], once_1M)[0]),
            }
            for c in counted
        ],
        **compared("map", "mAP", found, chance, _CHANCE, "random scores"),
    }


def resampled(
    truth_MC: np.ndarray, scores: Mapping[str, np.ndarray], seed: int, hashes: Sequence[str] = ()
) -> dict[str, Resampled]:
    """Return the mAP of each set of scores of the same samples, with the same bootstrap samples of the images. The mAP
    is the mean over the classes that occur.

    Args:
        truth_MC: whether a sample belongs to a class, bool; at least one sample belongs to one.
        scores: scores of the samples, [M, C], by name.
        seed: random seed of the bootstrap.
        hashes: hash of each sample's image; the bootstrap draws samples with equal hashes together. Empty: all images
            differ.
    """
    weights_BM = bootstrap_weights(image_clusters(hashes or [""] * len(truth_MC)), _RESAMPLES, seed)
    weights_BM = weights_BM[(weights_BM @ truth_MC).any(1)]  # a bootstrap sample may have no positives
    found = {}
    for name, scores_MC in scores.items():
        parts = ((truth_MC[:, c], scores_MC[:, c]) for c in np.flatnonzero(truth_MC.any(0)))
        of_class = [average_precisions(truth_M, scores_M, weights_BM) for truth_M, scores_M in parts]
        found[name] = Resampled(np.nanmean(of_class, 0))
    return found


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


def _columns(queries: FeatureBank, truth_MC: np.ndarray, scores_MC: np.ndarray, classes: Classes) -> dict[str, Any]:
    """Return the columns of the table of predictions: the keys, the labels of each sample, the hashes of the images
    and, in the order of `classes`, the scores of each sample and whether it belongs to the class."""
    labels = [[str(classes[number]) for number in row_C.nonzero()[0]] for row_C in truth_MC]
    images = {IMAGE_HASH: queries.image_hashes} if queries.image_hashes else {}
    return {"key": queries.keys, "labels": labels, "truth": truth_MC, "scores": scores_MC, **images}
