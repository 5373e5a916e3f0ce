"""Diagnostics of a run, derived from its log: descriptions of unusual behaviour with suggested fixes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from m3ae_fast.config import OptimConfig, TrainConfig

# With fewer steps than this, a run is not judged, because RankMe falls at first, and losses are still near those of
# constant predictions.
FEW_STEPS = 100
# A modality counts as learnt if its loss is below this fraction of both its first value and the loss of a constant
# prediction.
FALLEN = 0.98
# minimum number of log lines from which a training loss is judged; the loss varies from line to line, because the
# samples differ
_FEW = 10
# features have collapsed if their effective rank is below this, or below COLLAPSED_TO times the initial rank
COLLAPSED = 2.0
COLLAPSED_TO = 0.5
# a run that its time limit has shortened to less than this fraction of the planned steps is reported
SHORTENED = 0.9
# waiting for data is reported if it takes more than this fraction of the time (median of the log lines)
WAITING = 0.3

Metrics = Sequence[dict[str, Any]]  # lines of metrics.jsonl


class Diagnostic(NamedTuple):
    """A diagnostic: an unusual observation with a suggested fix."""

    name: str
    what: str
    suggestion: str


def diagnose(metrics: Metrics, config: Mapping[str, Any] | None = None) -> list[Diagnostic]:
    """Return the diagnostics, the most severe first; empty if there are none. `config`: the sections of the run's
    config, if known; settings that are already in use are not suggested."""
    config = config or {}
    learning = [few] if (few := _few_steps(metrics)) else [_collapse(metrics, config), *_learning(metrics)]
    return [each for each in (_shortened(metrics, config), *learning, _data(metrics, config)) if each]


def _shortened(metrics: Metrics, config: Mapping[str, Any]) -> Diagnostic | None:
    train, totals = config.get("train") or {}, series(metrics, "total_steps")
    planned, hours = train.get("steps"), train.get("hours")
    if not (planned and hours and totals) or totals[-1] >= SHORTENED * planned:
        return None
    what = f"only {totals[-1]:,.0f} of the {planned:,} planned steps fitted into train.hours={hours:g}"
    why = "because steps or evaluations took longer than expected"
    return Diagnostic("shorter than planned", f"{what}, {why}", "a longer time limit, or fewer other programs")


def _few_steps(metrics: Metrics) -> Diagnostic | None:
    steps, rates = max(series(metrics, "step"), default=0), series(metrics, "lr")
    warming = len(rates) > 1 and rates[-1] > rates[-2]
    if not steps or (steps >= FEW_STEPS and not warming):
        return None
    what = f"{steps:,.0f} {'step is' if steps == 1 else 'steps are'} too few to judge what the model learns"
    if warming:
        what += "; the learning rate is still rising in its warm-up"
    shorter = ", or a lower optim.warmup_epochs" if warming else ""
    return Diagnostic("too few steps", what, f"a higher train.epochs or train.steps{shorter}")


def _collapse(metrics: Metrics, config: Mapping[str, Any]) -> Diagnostic | None:
    ranks = series(metrics, "val_rankme")
    if len(ranks) < 2 or ranks[0] < COLLAPSED:  # too few held-out samples for a high rank
        return None
    first, last = ranks[0], ranks[-1]
    if last >= COLLAPSED and last >= COLLAPSED_TO * first:
        return None
    optim = config.get("optim") or {}
    advice = ["a lower optim.peak_lr", *clipping(optim.get("clip_grad", math.inf)), "a longer warm-up"]
    if optim.get("weight_decay") != 0:
        advice.append("a lower optim.weight_decay")
    return Diagnostic(
        "collapse",
        f"the effective rank of the features (RankMe) is {last:.1f}, compared with {first:.1f} before training: the "
        "features of different samples have become similar",
        either(advice),
    )


def clipping(clip_grad: float | None) -> list[str]:
    """Return a list with the suggestion to clip gradients, or to clip them more strongly than `clip_grad`. The list is
    empty if `clip_grad` is unknown (inf)."""
    if clip_grad == math.inf:
        return []
    return ["optim.clip_grad=1.0" if clip_grad is None or clip_grad > 1 else "a lower optim.clip_grad"]


def fix_of_losses(train: TrainConfig, optim: OptimConfig) -> str:
    """Return the changes of settings that are suggested if a loss or a weight is not finite."""
    advice = ["a lower optim.peak_lr", *clipping(optim.clip_grad)]
    if train.precision != "fp32":
        advice.append("train.precision=fp32")
    return either(advice)


def either(advice: Sequence[str]) -> str:
    """Return "a, b, or c"."""
    *others, last = advice
    return f"{', '.join(others)}, or {last}" if others else last


def _learning(metrics: Metrics) -> list[Diagnostic]:
    """Return diagnostics for images or texts that are not learnt. They are judged by the held-out losses or, if there
    are none, by the training loss."""
    learnt = {name: _learnt(metrics, name) for name in ("image", "text")}
    known = {name: good for name, good in learnt.items() if good is not None}
    suggested_fix = "an optim.peak_lr that is higher or lower by a factor of three, and more steps"
    if not known:
        losses = series(metrics, "loss")
        if len(losses) < _FEW or median(losses[-3:]) < FALLEN * losses[0]:
            return []
        return [Diagnostic("no learning", "the training loss has not fallen", suggested_fix)]
    if not any(known.values()):
        return [Diagnostic("no learning", " and ".join(_compared(metrics, name) for name in known), suggested_fix)]
    return [
        Diagnostic(
            f"only {other}s are learnt",
            f"{_compared(metrics, name)}{_constant(metrics, name)}",
            f"more steps, a higher loss.{name}_weight, or a lower loss.{other}_weight; look at the {name}s in "
            "reconstructions.png",
        )
        for name, other in (("image", "text"), ("text", "image"))
        if known.get(name) is False and known.get(other)
    ]


def _learnt(metrics: Metrics, name: str) -> bool | None:
    """Return whether a modality's held-out loss has fallen and is below the loss of a constant prediction; None if
    there are fewer than two evaluations."""
    relative = series(metrics, f"val_{name}_relative")
    return relative[-1] < FALLEN * min(relative[0], 1.0) if len(relative) > 1 else None


def _constant(metrics: Metrics, name: str) -> str:
    """Return an explanation if the loss has fallen only to the loss of a constant prediction; otherwise ""."""
    first, *_, last = series(metrics, f"val_{name}_relative")
    known = {
        "image": "the model has learnt only the mean patch",
        "text": "the model has learnt only the token frequencies",
    }
    return f": {known[name]}" if FALLEN <= last < FALLEN * first else ""


def _compared(metrics: Metrics, name: str) -> str:
    """Return a sentence about a modality's held-out loss."""
    constant = {"image": "predicting the mean patch", "text": "predicting the frequency of each word piece"}[name]
    first, *_, last = series(metrics, f"val_{name}_relative")
    return f"the {name} loss on held-out samples is {last:.2f} times that of {constant} (before training: {first:.2f})"


def _data(metrics: Metrics, config: Mapping[str, Any]) -> Diagnostic | None:
    # the first value is left out, because it includes the start of the workers
    waits = series(metrics, "data_wait")[1:]
    if not waits or median(waits) < WAITING:
        return None
    repeats = (config.get("data") or {}).get("repeats", 1)
    return Diagnostic("data bound", f"training waits for data {median(waits):.0%} of the time", faster_loading(repeats))


def faster_loading(repeats: int) -> str:
    """Return suggestions for a run whose loader is the bottleneck. `repeats`: value of data.repeats."""
    return f"a higher data.workers, smaller images (m3ae-fast shards make --short-side), or data.repeats={repeats + 1}"


def verdict(metrics: Metrics) -> str:
    """Return one sentence that summarises the results of the run: losses relative to constant predictions, accuracy
    and feature rank."""
    parts = [_compared(metrics, name) for name in ("image", "text") if len(series(metrics, f"val_{name}_relative")) > 1]
    accuracy = "k-NN accuracy {:.1%} (before training: {:.1%})"
    rank = "effective rank of the features (RankMe) {:.1f} (before training: {:.1f})"
    for name, text in {"val_knn_top1": accuracy, "val_rankme": rank}.items():
        if len(values := series(metrics, name)) > 1:
            parts.append(text.format(values[-1], values[0]))
            if name == "val_knn_top1" and (shares := series(metrics, "val_knn_largest_class")):
                above = "above" if values[-1] > shares[-1] else "not above"
                parts[-1] += f", {above} the share of the largest class ({shares[-1]:.1%})"
    return "; ".join(parts)


def series(metrics: Metrics, name: str) -> list[float]:
    """Return the finite values of a metric, in the order of the steps."""
    values = (line.get(name) for line in metrics)
    return [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
