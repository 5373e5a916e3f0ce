"""Metrics of a classification task, computed from predictions.parquet: besides the accuracy, metrics in which small
classes count as much as large ones.

Shapes: N samples, K classes that occur among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_confusion
from m3ae_fast.evaluation.compare_results import against_largest_class, one_prediction_each
from m3ae_fast.evaluation.significance import area_under_roc
from m3ae_fast.heads.predictions import FILE, IMAGE_HASH
from m3ae_fast.heads.standard_error import ERROR, effective_samples, error_of_accuracy, image_clusters


def class_metrics(folder: Path, classes: Classes, names: Sequence[str], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of result.json that accompany the accuracies of a classification task; empty for other tasks.

    These are the entries of `against_largest_class` and, if there is one prediction per sample, the following:

    - "balanced_accuracy": the mean of the accuracies of the classes (macro-averaged recall), with its standard error;
    - "val_copies", if there are any: the number of samples with the same image as an earlier sample;
    - "per_class": the number of samples and the accuracy of each class;
    - "auroc", if there are two classes: the area under the ROC curve of the second class's score, with its standard
    error.

    `classes`: labels of the training samples by class id. `names`: names of the classes for display.
    `result`: the other entries.
    """
    found = against_largest_class(folder, result)
    if not found:
        return {}
    table = read_parquet(folder / FILE)
    if not one_prediction_each(table):
        return found
    label_N, prediction_N = np.array(table["label"]), np.array(table["prediction"])
    rows = accuracy_by_class(label_N, label_N == prediction_N)
    called = dict(zip(map(str, classes), names))
    for row in rows:
        if (name := called.get(str(row["class"]), str(row["class"]))) != str(row["class"]):
            row["name"] = name
    found["balanced_accuracy"] = sum(row["accuracy"] for row in rows) / len(rows)
    right_N, clusters_N = label_N == prediction_N, image_clusters(table.get(IMAGE_HASH, [""] * len(label_N)))
    of_class = [label_N == row["class"] for row in rows]
    errors = [error_of_accuracy(right_N[own_N], _renumbered(clusters_N[own_N])) for own_N in of_class]
    found[f"balanced_accuracy{ERROR}"] = math.hypot(*errors) / len(rows)
    if len(classes) == len(rows) == 2 and "score" in table:
        second_N = label_N == classes[1]
        score_N = np.array(table["score"])
        score_N = np.where(prediction_N == classes[1], score_N, 1 - score_N)
        found["auroc"] = auroc(score_N[second_N], score_N[~second_N])
        found[f"auroc{ERROR}"] = auroc_error(
            found["auroc"], *(effective_samples(clusters_N[own_N]) for own_N in (~second_N, second_N))
        )
    if copies := len(clusters_N) - len(np.unique(clusters_N)):
        found["val_copies"] = copies
        found["verdict"] += (
            f"; {copies:,} of {len(clusters_N):,} held-out samples have the same image as an earlier one, and errors "
            "and tests count all samples of an image as one cluster"
        )
    return found | {"per_class": rows}


def _renumbered(clusters_N: np.ndarray) -> np.ndarray:
    """Return clusters with consecutive numbers from 0."""
    return np.unique(clusters_N, return_inverse=True)[1]


def accuracy_by_class(label_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, Any]]:
    """Return the entries "class", "samples" and "accuracy" of each class that occurs. `label_N`: class of each sample,
    integers or text; `right_N`: fraction of the trials, from 0 to 1, in which the sample was classified correctly."""
    found_K, place_N, samples_K = np.unique(label_N, return_inverse=True, return_counts=True)
    accuracy_K = np.bincount(place_N, right_N) / samples_K
    return [
        {"class": name, "samples": samples, "accuracy": accuracy}
        for name, samples, accuracy in zip(found_K.tolist(), samples_K.tolist(), accuracy_K.tolist())
    ]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the area under the ROC curve of scores that are higher for positives; equal scores count as one half.
    `positive`, `negative`: one-dimensional arrays of numbers, neither of which is empty."""
    values_V, place = np.unique(np.concatenate((positive, negative)), return_inverse=True)
    parts = place[: len(positive)], place[len(positive) :]
    return area_under_roc(*(np.bincount(part, minlength=len(values_V)) for part in parts))


def auroc_error(area: float, negatives: float, positives: float) -> float:
    """Return the standard error of an area under the ROC curve for these numbers of samples (Hanley and McNeil 1982,
    "The meaning and use of the area under a receiver operating characteristic (ROC) curve")."""
    one, other = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (one - area**2) + (negatives - 1) * (other - area**2)
    return math.sqrt(max(variance, 0.0) / (negatives * positives))


def draw_class_metrics(folder: Path, classes: Classes, names: Sequence[str]) -> None:
    """Plot the confusion matrix of the predictions in a task's folder to confusion.png."""
    table, ids = read_parquet(folder / FILE), {label: number for number, label in enumerate(classes)}
    labels_N, predicted_N = (torch.tensor([ids[label] for label in table[name]]) for name in ("label", "prediction"))
    draw_confusion(folder / "confusion.png", labels_N, predicted_N, names)
