"""Baselines on the same samples as a model: the same network with random weights, downscaled pixels, and a classifier
that always predicts the largest class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.significance import Difference, difference
from m3ae_fast.weights.model_name import PIXELS, RANDOM

MODEL = "the model"  # name of the evaluated model in comparisons with its baselines
UNTRAINED, SCALED, LARGEST = "random weights", "downscaled pixels", "the largest class"
PREFIXES = {UNTRAINED: RANDOM, SCALED: PIXELS}  # prefix of a model's name that denotes each baseline
BASELINES = "baselines"  # key of the results of the baselines in a result


class Baseline(NamedTuple):
    """The result of a baseline."""

    metrics: Mapping[str, float]  # metrics with their standard errors
    difference: Difference | None  # model's result minus the baseline's result; None: it cannot be estimated


def baseline_entries(baselines: Mapping[str, Baseline]) -> dict[str, Any]:
    """Return the results of the baselines as an entry of result.json; empty if there are no baselines."""
    if not baselines:
        return {}
    return {
        BASELINES: {
            name: {**each.metrics} | ({"difference": each.difference.entries()} if each.difference else {})
            for name, each in baselines.items()
        }
    }


def accuracy_entries(found: Mapping[str, Predictions]) -> dict[str, Any]:
    """Return the accuracies of a model and of its baselines as entries of result.json. `found`: predictions for the
    same samples, by MODEL and by the names of the baselines."""
    model = found[MODEL]

    def minus(other: Predictions) -> Difference | None:
        if len(model.keys) < 2:  # the interval cannot be estimated
            return None
        return difference(model.correct_N.numpy(), other.correct_N.numpy())

    baselines = {name: Baseline(each.accuracies(), minus(each)) for name, each in found.items() if name != MODEL}
    return model.accuracies() | baseline_entries(baselines)


def differences(result: Mapping[str, Any]) -> dict[str, Difference]:
    """Return the differences of a result from its baselines, by the name of the baseline."""
    found = {name: each.get("difference") for name, each in result.get(BASELINES, {}).items()}
    return {name: Difference.read(each) for name, each in found.items() if each}


def not_better(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return the metric of each baseline in a result, except for the baselines that the model exceeds significantly."""
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
        others: metrics of these baselines by name.
        name: name of the model.
    """
    if not others:
        return ""
    shown = ", ".join(f"{other.removeprefix('the ')} {each:.1%}" for other, each in others.items())
    *first, last = others
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{name} is not significantly better than {listed}: {metric} {value:.1%}, {shown}"
