"""Metrics of predictions for lists of labels, that is, for samples that belong to any number of classes.

Shapes: M held-out samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.data.labels import Classes
from m3ae_fast.evaluation.baseline_results import against_chance
from m3ae_fast.heads.average_precision import mean_average_precisions
from m3ae_fast.heads.predictions import ListPredictions


def list_metrics(model: ListPredictions, classes: Classes, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of result.json that accompany the mAP of a model, which is the mean over the classes that
    occur in the held-out samples. These entries are the number of these classes, the average precision of each of them,
    and the comparison with uninformative scores. The average precision of uninformative scores is that of equal scores,
    which is the fraction of the samples that belong to the class.

    Args:
        model: the predictions of the model.
        classes: labels by class id.
        result: the other entries.

    Raises:
        UserError: no class occurs.
    """
    chance = replace(model, scores_N=torch.zeros_like(model.scores_N)).resampled
    truth_MC, scores_MC = model.labels_N.numpy(), model.scores_N.numpy()
    per_class = [
        {
            "class": classes[c],
            "samples": samples,
            "average_precision": mean_average_precisions(truth_MC[:, [c]], scores_MC[:, [c]]).item(),
        }
        for c, samples in enumerate(truth_MC.sum(0).tolist())
        if samples
    ]
    if not per_class:
        raise UserError("--val: no readable sample has a label that also occurs in the training samples")
    compared = against_chance("map", "mAP", model.resampled, chance, "chance", "random scores", result)
    return {"chance_map": chance.value, "classes": len(per_class), "per_class": per_class, **compared}
