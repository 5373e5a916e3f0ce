"""Export of a run's weights as a folder for `M3AE.from_pretrained` or timm, or as ONNX files."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import CONFIG_FILE
from m3ae_fast.data.shard_store import is_remote
from m3ae_fast.model.card import model_card
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_weights, read_pretrained, write_pretrained
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.weights.onnx_model import write_onnx
from m3ae_fast.weights.open_model import SavedRun, is_run, run_weights, saved_run
from m3ae_fast.weights.timm_folder import write_timm

# sections of the config that the card shows; the other sections contain local paths
_SHOWN = ("masking", "loss", "optim", "train")


def write_export(
    run: str | Path,
    out: str | Path,
    format: str = "m3ae",
    name: str | None = None,
    weights: str = "average",
) -> Pretrained:
    """Write the float32 weights of a run (its last checkpoint), a checkpoint or an export to `out`.

    Args:
        run: a run folder, a checkpoint, or an export to convert to another format or to upload.
        out: a new folder, or an earlier export, which is then replaced.
        format: "m3ae", "timm" for the image encoder as timm's VisionTransformer, or "onnx" for the image encoder as the
            file `out`.
        name: name of the model in its card; None: the name of the folder.
        weights: "average" for the moving average of a run with `train.ema`, or "last".

    Returns:
        The exported weights.

    Raises:
        UserError: there is no checkpoint, it is damaged, or `out` cannot be written.
    """
    if not is_run(Path(run)) and (Path(run) / CONFIG_FILE).is_file():
        found, about = _read_export(run), ""
    else:
        saved, average = saved_run(Path(run)), weights == "average"
        found, about = run_weights(saved, average=average), _run_section(saved, average)
    if format != "m3ae" and found.config.resize == "native":
        size = found.config.image_size
        square = f"this format accepts only square images of {size} x {size} pixels; other images need format m3ae"
        found = replace(found, notes=(*found.notes, square))
    if format == "onnx":
        files = write_onnx(out, found.config, found.state)
        return replace(found, notes=(*found.notes, *map(str, files)))
    if format == "timm":
        write_timm(out, found.config, found.state)
    else:
        card = model_card(name or Path(out).resolve().name, found.config, about)
        write_pretrained(out, found, card)
    return found


def _read_export(folder: str | Path) -> Pretrained:
    found = replace(read_pretrained(folder), kind=f"export {folder}")
    with torch.device("meta"):
        check_weights(M3AE(found.config), found.state, str(folder))
    return found


def _run_section(run: SavedRun, average: bool) -> str:
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
