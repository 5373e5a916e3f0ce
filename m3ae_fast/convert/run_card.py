"""The part of a model card about the run that made the weights."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from m3ae_fast.errors import UserError
from m3ae_fast.open_model import SavedRun
from m3ae_fast.run.run_log import read_metrics

_SHOWN = ("masking", "loss", "optim", "train")  # sections; the others name this machine's folders


def run_section(run: SavedRun, average: bool) -> str:
    """Return Markdown: data, steps, the last metrics up to this checkpoint, settings. `average`: of which weights."""
    info, config = run.info, run.info.config
    data = [f"- `{_public(shards)}`" for shards in _shards(config.get("data") or {})]
    lines = ["## Training", "", f"{info.step:,} steps, {info.samples:,} samples seen, of", "", *data, ""]
    if average and run.ema:
        what = f"a moving average with decay {run.ema:g}; the metrics are of the last weights"
        lines += [f"These weights are {what}.", ""]
    metrics = _last_metrics(run)
    if metrics:
        lines += ["| metric | value | after step |", "|---|--:|--:|"]
        lines += [f"| {name} | {value:.4g} | {step:,} |" for name, (value, step) in metrics.items()]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    settings = {name: config[name] for name in _SHOWN if name in config}
    if train := settings.get("train"):
        settings["train"] = {key: value for key, value in train.items() if key != "probe"}  # which names shards
    return "\n".join([*lines, f"With {versions}.", "", "```json", json.dumps(settings, indent=2), "```", ""])


def _shards(data: dict[str, Any]) -> list[str]:
    patterns = [source.get("shards", "") for source in data.get("train", [])]
    return [one for pattern in patterns for one in ([pattern] if isinstance(pattern, str) else pattern)]


def _public(shards: str) -> str:
    """Return a URL without what may be secret: the user and the query."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", re.sub(r"\?\S*", "", shards))


def _last_metrics(run: SavedRun) -> dict[str, tuple[float, int]]:
    """Return, by name, the value of the last line that has it, up to the checkpoint's step, and the step of that
    line."""
    wanted = re.compile(r"(val_)?(loss|image_loss|text_loss|text_accuracy)")
    found: dict[str, tuple[float, int]] = {}
    with contextlib.suppress(UserError):  # a checkpoint that was moved
        for line in read_metrics(run.path.parents[1]):
            if (step := line["step"]) <= run.info.step:
                numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
                found |= {name: (value, step) for name, value in numbers.items() if wanted.fullmatch(name)}
    return found
