"""Baselines that are evaluated on the same samples as a model: the same network with random weights, features that are
computed from the images without a network, and a classifier that always predicts the largest class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.evaluation.significance import Difference, difference, interval, mean_accuracy, resampled_difference
from m3ae_fast.heads.predictions import ListPredictions, Predictions
from m3ae_fast.heads.standard_error import ERROR, Resampled
from m3ae_fast.weights.model_name import HOG, IMAGE_FEATURES, RANDOM

MODEL = "the model"  # name of the evaluated model in comparisons with its baselines
UNTRAINED, LARGEST = "random weights", "the largest class"
BASELINES = "baselines"  # key of the baselines' results in result.json
TOGETHER = "the model with HOG"  # name of the model's features concatenated with HOG
WITH_HOG = "with_hog"  # key of the results of TOGETHER in result.json
WARNINGS = "warnings"  # key of the list of warnings in result.json, which is missing if there are none
PROBE = "probe"  # key of the description of a baseline's classifier, if it differs from the classifier of the model
LOGISTIC = "logistic regression"


class Baseline(NamedTuple):
    """The result of a baseline."""

    metrics: Mapping[str, float]  # metrics with their standard errors
    difference: Difference | None  # model's result minus the baseline's result; None: it cannot be estimated
    probe: str = ""  # description of the baseline's classifier; "": the same classifier as for the model
    chosen: Mapping[str, Any] = {}  # hyper-parameters of the classifier that were selected


def baseline_models(model: str) -> dict[str, str]:
    """Return the names of a model's baselines on the command line, by display name."""
    return {UNTRAINED: f"{RANDOM}{model}"} | {display: name for name, display in IMAGE_FEATURES.items()}


def is_baseline(model: str) -> bool:
    """Return whether the name of a model on the command line denotes a baseline."""
    return model.startswith(RANDOM) or model in IMAGE_FEATURES


def baseline_entries(baselines: Mapping[str, Baseline]) -> dict[str, Any]:
    """Return the results of the baselines as an entry of result.json; empty if there are no baselines."""
    if not baselines:
        return {}
    return {
        BASELINES: {
            name: ({PROBE: each.probe} if each.probe else {})
            | {**each.metrics, **each.chosen}
            | (
                {"verdict": each.difference.words(MODEL, name), "difference": each.difference.entries()}
                if each.difference
                else {}
            )
            for name, each in baselines.items()
        }
    }


def accuracy_entries(found: Mapping[str, Sequence[Predictions]], probe: str = "") -> dict[str, Any]:
    """Return the accuracies of a model and of its baselines as entries of result.json. If `found` contains predictions
    from the features of the model and HOG together, the entries contain their accuracies too.

    Args:
        found: predictions for the same samples, for one or several draws of training samples; the keys are MODEL, the
            names of the baselines and, possibly, TOGETHER.
        probe: description of the classifier of the baselines; "": the same classifier as for the model.
    """
    model = found[MODEL]
    baselines = {
        name: Baseline(_accuracies(own), accuracy_difference(model, own), probe, chosen_entries(own))
        for name, own in found.items()
        if name not in (MODEL, TOGETHER)
    }
    entries = _accuracies(model) | chosen_entries(model) | baseline_entries(baselines)
    return entries | ({WITH_HOG: _together_entries(found)} if TOGETHER in found else {})


def _together_entries(found: Mapping[str, Sequence[Predictions]]) -> dict[str, Any]:
    """Return the results of TOGETHER as the entry WITH_HOG of result.json. `found`: as in `accuracy_entries`."""
    own, parts = found[TOGETHER], (MODEL, IMAGE_FEATURES[HOG])
    apart = {name: accuracy_difference(own, found[name]) for name in parts}
    known = {name: each for name, each in apart.items() if each}
    return {
        **_accuracies(own),
        **chosen_entries(own),
        "verdicts": [each.words(TOGETHER, name) for name, each in known.items()],
        "differences": {name: each.entries() for name, each in known.items()},
    }


def _accuracies(found: Sequence[Predictions]) -> dict[str, float]:
    return {name: value for name, value in measured(found).items() if name not in ("draws", "low", "high")}


def measured(found: Sequence[Predictions]) -> dict[str, Any]:
    """Return the accuracies, or the mAP, with their standard errors. For several draws, return the mean top-1 accuracy
    with its standard error and 95 % confidence interval."""
    if len(found) == 1:
        return found[0].accuracies()
    correct_DN = np.stack([predictions.correct_N.numpy() for predictions in found])
    top1, error = mean_accuracy(correct_DN, found[0].clusters_N)
    low, high = interval([predictions.accuracies()["top1"] for predictions in found])
    return {"top1": top1, f"top1{ERROR}": error, "draws": len(found), "low": max(low, 0.0), "high": min(high, 1.0)}


def chosen_entries(found: Sequence[Predictions]) -> dict[str, Any]:
    """Return the hyper-parameters that were selected; empty for several draws, because each has its own."""
    return {**found[0].chosen} if len(found) == 1 else {}


def accuracy_difference(first: Sequence[Predictions], second: Sequence[Predictions]) -> Difference | None:
    """Return the accuracy of the first classifier, averaged over trials, minus that of the second. For lists of labels,
    return the difference between their mAP instead. Return None if the difference cannot be estimated, for example
    because there is only one sample, or because the classifiers were not evaluated on the same samples."""
    keys = first[0].keys
    if len(keys) < 2 or second[0].keys != keys:
        return None
    if isinstance(first[0], ListPredictions) and isinstance(second[0], ListPredictions):
        return resampled_difference(first[0].resampled, second[0].resampled)
    first_N, second_N = (np.mean([each.correct_N.numpy() for each in trials], 0) for trials in (first, second))
    return difference(first_N, second_N, first[0].clusters_N)


def baseline_name(name: str, entries: Mapping[str, Any]) -> str:
    """Return the name of a baseline for display, with its classifier if this differs from that of the model.
    `entries`: the entries of the baseline in result.json."""
    return f"{name} ({entries[PROBE]})" if PROBE in entries else name


def differences(result: Mapping[str, Any]) -> dict[str, Difference]:
    """Return the differences between a result and its baselines, by name of the baseline."""
    found = {name: each.get("difference") for name, each in result.get(BASELINES, {}).items()}
    return {name: Difference.read(each) for name, each in found.items() if each}


def not_better(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return the metrics of the baselines that the model does not exceed significantly, by name of the baseline.
    `result`: the model's result, which contains those of the baselines."""
    apart = differences(result)
    return {
        name: each[metric]
        for name, each in result.get(BASELINES, {}).items()
        if name not in apart or not apart[name].is_better
    }


def warning(metric: str, value: float, others: Mapping[str, float], name: str = MODEL) -> str:
    """Return a warning that a model is not significantly better than baselines; "" if `others` is empty.

    Args:
        metric: name of the metric for display.
        value: metric of the model.
        others: metrics of the baselines, by name of the baseline.
        name: name of the model.
    """
    if not others:
        return ""
    shown = ", ".join(f"{other.removeprefix('the ')} {each:.1%}" for other, each in others.items())
    *first, last = others
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{name} is not significantly better than {listed}: {metric} {value:.1%}, {shown}"


def against_chance(
    name: str,
    title: str,
    model: Resampled,
    chance: Resampled,
    chance_name: str,
    rule: str,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the entries of result.json that compare a metric of a whole dataset with that of predictions that need no
    model. If the errors can be estimated, the entries are "verdict" and, if these predictions or a baseline are not
    significantly worse than the model, WARNINGS. Otherwise, the only entry is WARNINGS.

    Args:
        name: name of the metric in the result.
        title: name of the metric for display.
        model: the metric of the model.
        chance: the metric of predictions that need no model.
        chance_name: name of these predictions in the warning.
        rule: description of these predictions in the verdict.
        result: the model's result, which contains those of the baselines.
    """
    apart = resampled_difference(model, chance)
    if apart is None:
        return {
            WARNINGS: [
                f"the standard error of {title} cannot be estimated from these held-out samples; use more of them"
            ]
        }
    others = ({} if apart.is_better else {chance_name: chance.value}) | not_better(result, name)
    text = warning(title, model.value, others)
    found = {"verdict": f"{title} {model.value:.1%}; difference from {rule} {apart.points()}"}
    return found | ({WARNINGS: [text]} if text else {})
