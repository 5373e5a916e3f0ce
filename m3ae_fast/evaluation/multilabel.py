"""Multi-label classification of frozen features, for samples that belong to any number of classes. A classifier for
each class scores the held-out samples; the metric is the mean of the classes' average precisions (mAP).

Shapes: N training samples, M held-out samples, R of them on this rank, L different lists of labels, C classes, D width,
V different scores, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data.label_lists import LabelledLists, list_corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import logits
from m3ae_fast.evaluation.job import Job, PartialResult
from m3ae_fast.evaluation.logistic_regression import fit
from m3ae_fast.evaluation.neighbours import nearest
from m3ae_fast.evaluation.significance import ERROR, middle

_RESAMPLES = 200  # number of bootstrap samples


def run(job: Job) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if a sample has no list of labels, and as `Job.open`
    does."""
    config, knn = job.config.multilabel, job.config.knn
    job.keep_if_stopped(lambda: PartialResult("the samples are being encoded", {}, {}))
    train = _open(job, job.config.data.train, None)
    val = _open(job, job.config.data.val, train.classes)
    encode = job.encoder(train.corpus.samples + val.corpus.samples)
    bank, queries = encode(train.corpus, "encoding train"), encode(val.corpus, "encoding val")
    job.keep_if_stopped(lambda: PartialResult("the samples are encoded", {}, {}))
    truth_NC, truth_MC = (part.classes_LC[each.labels] for part, each in ((train, bank), (val, queries)))
    if config.head == "knn":
        scores_RC = neighbour_scores(bank, queries, truth_NC, knn.k, knn.temperature)
    else:
        scores_RC = logits(fit(bank, truth_NC, len(train.classes), job.heartbeats), queries)
    scores_MC = queries.complete(scores_RC).numpy()
    job.keep(_columns(queries.keys, truth_MC, scores_MC, train.classes))
    result = measured(truth_MC.numpy(), scores_MC, truth_NC.any(0).numpy(), train.classes, job.config.run.seed)
    return result | {"head": config.head, "train_samples": len(bank.keys), "val_samples": len(queries.keys)}


def _open(job: Job, sources: Sequence[SourceConfig], classes: Classes | None) -> LabelledLists:
    found = list_corpus(job.open(sources), job.options.labels, classes, progress=job.ranks.is_main)
    job.say(f"{found.corpus.samples:,} samples with lists of {len(found.classes):,} classes")
    if found.unknown:
        job.say(f"note: {found.unknown:,} labels of --val have no training sample and are left out")
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
    truth_MC: np.ndarray, scores_MC: np.ndarray, known_C: np.ndarray, classes: Classes, seed: int
) -> dict[str, Any]:
    """Return the entries of result.json. The mAP is the mean over the classes that occur in both the training and the
    held-out samples. Its standard error, and the interval of its difference from uninformative scores, are computed by
    the bootstrap over samples. The average precision of uninformative scores is the fraction of the samples that belong
    to the class.

    Args:
        truth_MC: whether a held-out sample belongs to a class.
        scores_MC: scores of the held-out samples.
        known_C: whether a class occurs in the training samples.
        classes: labels by class id.
        seed: random seed of the bootstrap.

    Raises:
        UserError: no class occurs in both the training and the held-out samples.
    """
    counted = np.flatnonzero(truth_MC.any(0) & known_C).tolist()
    if not counted:
        raise UserError("--val: no sample that can be read has a label of a training sample that can be read")
    samples = len(truth_MC)
    weights_BM = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=_RESAMPLES)
    weights_BM = np.concatenate((np.ones((1, samples), np.int64), weights_BM))  # the first row has the original samples
    found_CB = np.array([average_precisions(truth_MC[:, c], scores_MC[:, c], weights_BM) for c in counted])
    chance_CB = np.where(np.isnan(found_CB), np.nan, (truth_MC[:, counted].T @ weights_BM.T) / samples)
    drawn_B = ~np.isnan(found_CB).all(0)  # a bootstrap sample may have no sample of any class
    found_B, chance_B = np.nanmean(found_CB[:, drawn_B], 0), np.nanmean(chance_CB[:, drawn_B], 0)
    low, high = middle(found_B[1:] - chance_B[1:])
    mean, chance = float(found_B[0]), float(chance_B[0])
    result: dict[str, Any] = {
        "map": mean,
        f"map{ERROR}": float(found_B[1:].std(ddof=1)),
        "chance_map": chance,
        "classes": len(counted),
        "per_class": [
            {
                "class": classes[c],
                "samples": int(truth_MC[:, c].sum()),
                "average_precision": float(found_CB[row, 0]),
            }
            for row, c in enumerate(counted)
        ],
        "verdict": f"mAP {mean:.1%}; difference from random scores {100 * (mean - chance):+.1f} points, 95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f}",
    }
    if low <= 0:
        result["warning"] = f"the model is not significantly better than chance: mAP {mean:.1%}, chance {chance:.1%}"
    return result


def average_precisions(truth_M: np.ndarray, scores_M: np.ndarray, weights_BM: np.ndarray) -> np.ndarray:
    """Return the average precision of a class for each weighting of the samples, [B]: the sum over the distinct scores
    of the precision at that score times the increase in recall. It is NaN if no sample of the class has a positive
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
