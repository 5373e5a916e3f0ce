"""The section about a run in the model card of its weights."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.data.shard_names import is_remote
from m3ae_fast.weights.open_model import SavedRun

# sections of the config that the card shows; the other sections contain local paths
_SHOWN = ("masking", "loss", "optim", "train")


def run_section(run: SavedRun, average: bool) -> str:
    """Return a Markdown section with the data, the steps, the last metrics up to the checkpoint, and the settings.
    `average`: whether the averaged weights are exported."""
    info, config = run.info, run.info.config
    data = [f"- `{_public(shards)}`" for shards in _shards(config.get("data") or {})]
    seen = f"{info.step:,} steps, {info.samples:,} samples seen, from these shards:"
    lines = ["## Training", "", seen, "", *data, ""]
    if average and run.ema:
        what = f"a moving average with decay {run.ema:g}; the metrics were computed with the last weights"
        lines += [f"These weights are {what}.", ""]
    metrics = _last_metrics(run)
    if metrics:
        lines += ["| metric | value | after step |", "|---|--:|--:|"]
        lines += [f"| {name} | {value:.4g} | {step:,} |" for name, (value, step) in metrics.items()]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    settings = {name: config[name] for name in _SHOWN if name in config}
    if train := settings.get("train"):
        # The section `probe` is left out because it contains paths of shards.
        settings["train"] = {key: value for key, value in train.items() if key != "probe"}
    return "\n".join([*lines, f"With {versions}.", "", "```json", json.dumps(settings, indent=2), "```", ""])


def _shards(data: dict[str, Any]) -> list[str]:
    patterns = [source.get("shards", "") for source in data.get("train", [])]
    return [one for pattern in patterns for one in ([pattern] if isinstance(pattern, str) else pattern)]


def _public(shards: str) -> str:
    """Return the publishable part of a shard pattern: the file name of a local path, a URL without user and query, or
    "pipe:..." for a command."""
    if shards.startswith("pipe:"):
        return "pipe:..."
    if "::" in shards:
        return "::".join(map(_public, shards.split("::")))
    if not is_remote(shards):
        return shards.rpartition("/")[2]
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", re.sub(r"\?\S*", "", shards))


def _last_metrics(run: SavedRun) -> dict[str, tuple[float, int]]:
    """Return, by name of the metric, the last value up to the checkpoint's step, and the step at which this value was
    logged."""
    wanted = re.compile(r"(val_)?(loss|image_loss|text_loss|text_accuracy)")
    found: dict[str, tuple[float, int]] = {}
    with contextlib.suppress(UserError):  # the checkpoint has been moved away from its run
        for line in read_metrics(run.path.parents[1]):
            if (step := line["step"]) <= run.info.step:
                numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
                found |= {name: (value, step) for name, value in numbers.items() if wanted.fullmatch(name)}
    return found
