"""Predictions of a classifier for each sample, and the table in which a task stores them.

Shapes: N samples, C classes, K best classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.data.labels import Classes
from m3ae_fast.heads.average_precision import mean_average_precisions, resampled
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.standard_error import ERROR, Resampled, error_of_accuracy, image_clusters

FILE = "predictions.parquet"
IMAGE_HASH = "image_hash"  # column of the table; see `Sample.image_hash`


def best_classes(scores_NC: Tensor) -> Tensor:
    """Return the class with the highest score or, if there are more than 5 classes, the classes with the 5 highest
    scores, best first: int64 [N, K]. Raises UserError if a score is not finite, because NaN would rank highest."""
    bad = int((~scores_NC.isfinite()).any(1).sum())
    if bad:
        raise UserError(
            f"{bad:,} of {len(scores_NC):,} samples have scores that are not finite: the classifier has diverged, or "
            "is damaged; train it again, with a lower peak_lr"
        )
    return scores_NC.topk(5 if scores_NC.shape[1] > 5 else 1, dim=1).indices


def topk_accuracy(best_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return the accuracies "top1" and, if K = 5, "top5", from 0 to 1."""
    correct_NK = best_NK == labels_N[:, None]
    return {f"top{k}": correct_NK[:, :k].any(1).double().mean().item() for k in sorted({1, best_NK.shape[1]})}


def largest_share(labels: Iterable[Any], classes: int = 1) -> float:
    """Return the fraction of the samples that belong to the `classes` largest classes. It equals the accuracy of a
    classifier that always predicts these classes."""
    counts = Counter(labels)
    return sum(count for _, count in counts.most_common(classes)) / counts.total()


@dataclass(frozen=True)
class Predictions:
    """Predictions of N samples, on the CPU, and how the classifier was found."""

    keys: list[str]
    labels_N: Tensor  # labels as in `FeatureBank`
    best_NK: Tensor  # result of `best_classes`
    scores_N: Tensor  # float32: score of each sample's best class, from 0 to 1
    image_hashes: list[str] = field(default_factory=list)  # see `Sample.image_hash`; empty: they are unknown
    chosen: Mapping[str, Any] = field(default_factory=dict)  # hyper-parameters that were selected
    warnings: tuple[str, ...] = ()  # warnings about the reliability of the accuracy
    classifier: LinearHeads | None = None  # the classifier, a stack of one head; None: it cannot be saved

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        labels_N: Tensor,
        scores_NC: Tensor,
        *,
        votes: bool = False,
        image_hashes: Sequence[str] = (),
    ) -> Predictions:
        """Return the predictions for floating-point class scores, as ListPredictions for lists of labels. By default,
        scores are logits, and their softmax is stored. If `votes` is set, they are votes, and each class's fraction of
        the votes is stored. Raises UserError as `best_classes` does."""
        best_NK = best_classes(scores_NC)
        if labels_N.ndim == 2:
            return ListPredictions(list(keys), labels_N.cpu(), best_NK.cpu(), scores_NC.cpu(), list(image_hashes))
        shares_NC = scores_NC / scores_NC.sum(1, keepdim=True) if votes else scores_NC.float().softmax(1)
        scores_N = shares_NC.gather(1, best_NK[:, :1])[:, 0].float()
        return cls(list(keys), labels_N.cpu(), best_NK.cpu(), scores_N.cpu(), list(image_hashes))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the concatenation of predictions."""
        tensors = [torch.cat([getattr(part, name) for part in parts]) for name in ("labels_N", "best_NK", "scores_N")]
        lists = [[*chain.from_iterable(getattr(part, name) for part in parts)] for name in ("keys", "image_hashes")]
        return type(parts[0])(lists[0], tensors[0], tensors[1], tensors[2], lists[1])

    @classmethod
    def read(cls, columns: Mapping[str, Sequence[Any]], classes: Classes) -> Predictions:
        """Return the predictions with these `columns`, in which only the best class of each sample is known."""
        ids = {label: number for number, label in enumerate(classes)}
        labels_N, best_N = (torch.tensor([ids[each] for each in columns[name]]) for name in ("label", "prediction"))
        scores_N = torch.tensor(columns["score"], dtype=torch.float32)
        return cls(list(columns["key"]), labels_N, best_N[:, None], scores_N, list(columns.get(IMAGE_HASH, ())))

    @property
    def correct_N(self) -> Tensor:
        """Return whether the best class is the correct one, bool [N]."""
        return self.best_NK[:, 0] == self.labels_N

    @property
    def clusters_N(self) -> np.ndarray:
        """Return the cluster of each sample, int64 [N]; see `image_clusters`."""
        return image_clusters(self.image_hashes or [""] * len(self.keys))

    @property
    def quality(self) -> float:
        """Return the metric by which hyper-parameters are chosen: the accuracy or, for lists of labels, the mAP."""
        return self.correct_N.double().mean().item()

    def accuracies(self) -> dict[str, float]:
        """Return the accuracies "top1" and, if there are more than 5 classes, "top5", from 0 to 1, with their standard
        errors, such as "top1_se"."""
        found, clusters_N = topk_accuracy(self.best_NK, self.labels_N), self.clusters_N
        for name in [*found]:
            correct_N = (self.best_NK[:, : int(name.removeprefix("top"))] == self.labels_N[:, None]).any(1)
            found[f"{name}{ERROR}"] = error_of_accuracy(correct_N.numpy(), clusters_N)
        return found

    def columns(self, classes: Classes) -> dict[str, list[Any]]:
        """Return the columns of the table: keys, labels and predicted labels as in the shards, and scores."""
        named = {"label": self.labels_N, "prediction": self.best_NK[:, 0]}
        columns = {name: [classes[number] for number in ids.tolist()] for name, ids in named.items()}
        images = {IMAGE_HASH: self.image_hashes} if self.image_hashes else {}
        return {"key": self.keys, **columns, "score": self.scores_N.tolist(), **images}


@dataclass(frozen=True)
class ListPredictions(Predictions):
    """Predictions of samples with lists of labels. `scores_N` contains the scores of all classes, float32 [N, C]."""

    @property
    def quality(self) -> float:
        return mean_average_precisions(self.labels_N.numpy(), self.scores_N.numpy()).item()

    @cached_property
    def resampled(self) -> Resampled:
        """Return the mAP for the samples and for bootstrap samples."""
        return resampled(self.labels_N.numpy(), self.scores_N.numpy(), self.image_hashes)

    def accuracies(self) -> dict[str, float]:
        """Return the mAP, "map", and its standard error, "map_se", if this can be estimated."""
        return self.resampled.entries("map")

    def columns(self, classes: Classes) -> dict[str, list[Any]]:
        """Return the columns of the table: keys, labels, truth and scores. The truth contains, for each of `classes`
        in order, whether the sample belongs to the class; the scores are in the same order."""
        labels = [[str(classes[number]) for number in row_C.nonzero()[:, 0]] for row_C in self.labels_N]
        images = {IMAGE_HASH: self.image_hashes} if self.image_hashes else {}
        each = {"truth": [*self.labels_N.numpy()], "scores": [*self.scores_N.numpy()]}
        return {"key": self.keys, "labels": labels, **each, **images}


def stacked(parts: Iterable[tuple[Predictions, Mapping[str, Any]]], classes: Classes) -> dict[str, list[Any]]:
    """Return one table with several sets of predictions. Each mapping contains the additional columns that identify
    the set."""
    columns: dict[str, list[Any]] = {}
    for predictions, which in parts:
        same = {name: [value] * len(predictions.keys) for name, value in which.items()}
        for name, values in (predictions.columns(classes) | same).items():
            columns.setdefault(name, []).extend(values)
    return columns
