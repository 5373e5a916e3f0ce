"""What is unusual about a run, in words, from what it logged, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

FALLEN = 0.98  # of the first evaluation's: a loss that is not below has not fallen
_FEW = 10  # log lines: with fewer a training loss, which is of other samples each time, is not judged
COLLAPSED = 2.0  # dimensions, and COLLAPSED_TO of the untrained network's: features that fill fewer have collapsed
COLLAPSED_TO = 0.5
WAITING = 0.3  # of the time spent waiting for data, by the median of the log lines

Metrics = Sequence[dict[str, Any]]  # lines of metrics.jsonl


class Finding(NamedTuple):
    """Something unusual."""

    name: str
    what: str
    remedy: str


def findings(metrics: Metrics) -> list[Finding]:
    """Return what is unusual, the gravest first; empty where nothing is."""
    found = [_collapse(metrics), *_learning(metrics), _data(metrics)]
    return [finding for finding in found if finding]


def _collapse(metrics: Metrics) -> Finding | None:
    ranks = series(metrics, "val_rankme")
    if len(ranks) < 2 or ranks[0] < COLLAPSED:  # too few held-out samples to fill more
        return None
    first, last = ranks[0], ranks[-1]
    if last >= COLLAPSED and last >= COLLAPSED_TO * first:
        return None
    return Finding(
        "collapse",
        f"the features fill {last:.1f} dimensions (RankMe), and those of the untrained network {first:.1f}: samples "
        "have become hard to tell apart",
        "a lower optim.peak_lr, optim.clip_grad=1.0, a longer warm-up, or less optim.weight_decay",
    )


def _learning(metrics: Metrics) -> list[Finding]:
    """Judge images and texts by their losses on held-out samples, or without these by the training loss."""
    learnt = {name: _learnt(metrics, name) for name in ("image", "text")}
    known = {name: good for name, good in learnt.items() if good is not None}
    remedy = "a higher or lower optim.peak_lr by a factor of three, and more steps"
    if not known:
        losses = series(metrics, "loss")
        if len(losses) < _FEW or median(losses[-3:]) < FALLEN * losses[0]:
            return []
        return [Finding("no learning", "the training loss has not fallen", remedy)]
    if not any(known.values()):
        return [Finding("no learning", " and ".join(_compared(metrics, name) for name in known), remedy)]
    return [
        Finding(
            f"{other} alone learns",
            _compared(metrics, name),
            f"a higher loss.{name}_weight, or a lower loss.{other}_weight; look at the {name}s in reconstructions.png",
        )
        for name, other in (("image", "text"), ("text", "image"))
        if known.get(name) is False and known.get(other)
    ]


def _learnt(metrics: Metrics, name: str) -> bool | None:
    """Return whether a modality's held-out loss has fallen; None where there are not two evaluations of it."""
    relative = series(metrics, f"val_{name}_relative")
    return relative[-1] < FALLEN * relative[0] if len(relative) > 1 else None


def _compared(metrics: Metrics, name: str) -> str:
    """Return a sentence on a modality's held-out loss."""
    constant = {"image": "predicting the mean patch", "text": "predicting how often each word piece occurs"}[name]
    first, *_, last = series(metrics, f"val_{name}_relative")
    return f"the {name} loss on held-out samples is {last:.2f} of that of {constant}, and began at {first:.2f}"


def _data(metrics: Metrics) -> Finding | None:
    waits = series(metrics, "data_wait")[1:]  # the first is that of the workers' start
    if not waits or median(waits) < WAITING:
        return None
    return Finding(
        "data bound",
        f"training waits for data {median(waits):.0%} of the time",
        "more data.workers, smaller images (from-folder --short-side), or data.repeats=2",
    )


def verdict(metrics: Metrics) -> str:
    """Return a sentence on what the run has come to: losses beside constant predictions, accuracy, features."""
    parts = [_compared(metrics, name) for name in ("image", "text") if len(series(metrics, f"val_{name}_relative")) > 1]
    accuracy = "k-NN accuracy {:.1%}, before training {:.1%}"
    rank = "the features fill {:.1f} dimensions (RankMe), before training {:.1f}"
    for name, text in {"val_knn_top1": accuracy, "val_rankme": rank}.items():
        if len(values := series(metrics, name)) > 1:
            parts.append(text.format(values[-1], values[0]))
            if name == "val_knn_top1" and (shares := series(metrics, "val_knn_largest_class")):
                above = "" if values[-1] > shares[-1] else "not above "
                parts[-1] += f", {above}the largest class {shares[-1]:.1%}"
    return "; ".join(parts)


def series(metrics: Metrics, name: str) -> list[float]:
    """Return the finite values of a metric, in the order of the steps."""
    values = (line.get(name) for line in metrics)
    return [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
