"""Export of a model, with options to measure the accuracy of its ONNX files and to upload it to the Hugging Face
Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import push_folder
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.evaluation.onnx_check import OnnxCheck, check_onnx, open_labelled
from m3ae_fast.model.pretrained import Pretrained
from m3ae_fast.weights.exporting import write_export
from m3ae_fast.weights.onnx_model import NEEDS, file_names

Format = Literal["m3ae", "timm", "onnx"]
Weights = Literal["average", "last"]


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    weights: Pretrained
    check: OnnxCheck | None = None  # check of the ONNX files, if labelled images were given
    address: str | None = None  # address on the Hub, if the folder was uploaded


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format = "m3ae",
    weights: Weights = "average",
    push: str | None = None,
    private: bool = False,
    train: str | Sequence[str] = (),
    val: str | Sequence[str] = (),
    labels: str = "cls",
) -> Exported:
    """Write the float32 weights of a model, and return the result.

    Args:
        model: a run folder (its last checkpoint), a checkpoint, or an export to convert to another format or to upload.
        out: a new folder, or an earlier export, which is replaced; for "onnx", the file to write.
        format: "m3ae" for a folder that `load_model` reads, "timm" for the image encoder as timm's VisionTransformer,
            or "onnx" for the image encoder as two files, in float32 and in int8.
        weights: for a run with `train.ema`, the weights to export: the moving "average" or the "last" ones.
        push: name, OWNER/NAME, under which the folder is also uploaded to the Hugging Face Hub.
        private: whether to make the repository on the Hub private if it does not exist yet.
        train, val: for "onnx", labelled shards. The k-NN accuracy of both files and of torch is measured on `val`, with
            neighbours from `train`.
        labels: source of the labels: "cls", or "json." and the name of a field.

    Raises:
        UserError: the model does not exist or is damaged, an argument is invalid, arguments cannot be combined, a
            library is missing, or the result cannot be written or uploaded.
    """
    bank, queries = ([given] if isinstance(given, str) else list(given) for given in (train, val))
    for name, value, allowed in (("format", format, get_args(Format)), ("weights", weights, get_args(Weights))):
        if value not in allowed:
            raise UserError(f"--{name} {value}: must be one of {', '.join(allowed)}")
    if push and format == "onnx":
        raise UserError("--push uploads a folder, but --format onnx writes files; leave out --push")
    if private and not push:
        raise UserError("--private can be used only with --push")
    if (bank or queries) and not (bank and queries and format == "onnx"):
        raise UserError("--train and --val can be used only together, and only with --format onnx")
    if format == "onnx":
        require_libraries(NEEDS)
    images = open_labelled(bank, queries, labels) if bank else None
    path = Path(out)
    found = write_export(Path(model), path, format, push, weights)
    return Exported(
        found,
        check_onnx(file_names(path), found.config, found.state, images) if images else None,
        push_folder(path, push, private) if push else None,
    )
