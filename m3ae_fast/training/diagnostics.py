"""What is unusual about a run, in words, from what it logged, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from m3ae_fast.config import LoopConfig, ScheduleConfig

FEW_STEPS = 100  # with fewer a model is as good as untrained: RankMe falls at first, and losses are near constants
FALLEN = 0.98  # of the first evaluation's, and of a constant prediction's: a loss that is not below has not been learnt
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


def findings(metrics: Metrics, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Return the diagnostics, most severe first; an empty list if there are none. `config`: the run's sections, if they
    are known, whose settings are not advised again."""
    config = config or {}
    learning = [few] if (few := _few_steps(metrics)) else [_collapse(metrics, config), *_learning(metrics)]
    return [finding for finding in (*learning, _data(metrics, config)) if finding]


def _few_steps(metrics: Metrics) -> Finding | None:
    steps, rates = max(series(metrics, "step"), default=0), series(metrics, "lr")
    warming = len(rates) > 1 and rates[-1] > rates[-2]
    if not steps or (steps >= FEW_STEPS and not warming):
        return None
    what = f"{steps:,.0f} {'step is' if steps == 1 else 'steps are'} too few to judge what the model learns"
    if warming:
        what += "; the learning rate is still rising in its warm-up"
    shorter = ", or a shorter optim.warmup_epochs" if warming else ""
    return Finding("too few steps", what, f"a higher train.epochs or train.steps{shorter}")


def _collapse(metrics: Metrics, config: Mapping[str, Any]) -> Finding | None:
    ranks = series(metrics, "val_rankme")
    if len(ranks) < 2 or ranks[0] < COLLAPSED:  # too few held-out samples to fill more
        return None
    first, last = ranks[0], ranks[-1]
    if last >= COLLAPSED and last >= COLLAPSED_TO * first:
        return None
    optim = config.get("optim") or {}
    advice = ["a lower optim.peak_lr", *clipping("optim", optim.get("clip_grad", math.inf)), "a longer warm-up"]
    if optim.get("weight_decay") != 0:
        advice.append("less optim.weight_decay")
    return Finding(
        "collapse",
        f"the features fill {last:.1f} dimensions (RankMe), and those of the untrained network {first:.1f}: those "
        "of different samples have become alike",
        either(advice),
    )


def clipping(section: str, clip_grad: float | None) -> list[str]:
    """Return the advice to clip gradients, more than `clip_grad` does; none where that is not known (inf)."""
    if clip_grad == math.inf:
        return []
    return [f"{section}.clip_grad=1.0" if clip_grad is None or clip_grad > 1 else f"a lower {section}.clip_grad"]


def fix_of_losses(settings: LoopConfig, optim: ScheduleConfig) -> str:
    """Return the settings to change if a loss or weight is not finite."""
    precision = getattr(settings, "precision", "fp32")
    advice = [f"a lower {optim.SECTION}.peak_lr", *clipping(optim.SECTION, getattr(optim, "clip_grad", None))]
    if precision != "fp32":
        advice.append(f"{settings.SECTION}.precision=fp32")
    return either(advice)


def either(advice: Sequence[str]) -> str:
    """Return "a, b, or c"."""
    *others, last = advice
    return f"{', '.join(others)}, or {last}" if others else last


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
            f"{_compared(metrics, name)}{_constant(metrics, name)}",
            f"more steps, a higher loss.{name}_weight, or a lower loss.{other}_weight; look at the {name}s in "
            "reconstructions.png",
        )
        for name, other in (("image", "text"), ("text", "image"))
        if known.get(name) is False and known.get(other)
    ]


def _learnt(metrics: Metrics, name: str) -> bool | None:
    """Return whether a modality's held-out loss has fallen, and below that of a constant prediction; None if there
    are not two evaluations of it."""
    relative = series(metrics, f"val_{name}_relative")
    return relative[-1] < FALLEN * min(relative[0], 1.0) if len(relative) > 1 else None


def _constant(metrics: Metrics, name: str) -> str:
    """Return what a loss means that has fallen to that of a constant prediction, and no further."""
    first, *_, last = series(metrics, f"val_{name}_relative")
    known = {"image": "of images the mean patch is known", "text": "of texts the frequencies of word pieces are known"}
    return f": {known[name]}, and no more" if FALLEN <= last < FALLEN * first else ""


def _compared(metrics: Metrics, name: str) -> str:
    """Return a sentence on a modality's held-out loss."""
    constant = {"image": "predicting the mean patch", "text": "predicting how often each word piece occurs"}[name]
    first, *_, last = series(metrics, f"val_{name}_relative")
    return f"the {name} loss on held-out samples is {last:.2f} of that of {constant}, and began at {first:.2f}"


def _data(metrics: Metrics, config: Mapping[str, Any]) -> Finding | None:
    waits = series(metrics, "data_wait")[1:]  # the first is that of the workers' start
    if not waits or median(waits) < WAITING:
        return None
    repeats = (config.get("data") or {}).get("repeats", 1)
    return Finding(
        "data bound",
        f"training waits for data {median(waits):.0%} of the time",
        f"more data.workers, smaller images (m3ae-fast shards make --short-side), or data.repeats={repeats + 1}",
    )


def verdict(metrics: Metrics) -> str:
    """Return one sentence that summarises the results of the run: losses relative to constant predictions, accuracy,
    feature rank."""
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
