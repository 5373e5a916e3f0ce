"""Conversion of weights, from runs, exports or other programs, to a folder for this library or for timm, or to an ONNX
file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import push_folder
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import POOLINGS, POOLS, Pool
from m3ae_fast.model.card import model_card
from m3ae_fast.model.pretrained import Pretrained, write_pretrained
from m3ae_fast.vqgan.flax import convert_vqgan
from m3ae_fast.vqgan.model import VQGAN
from m3ae_fast.weights.from_mae_or_timm import ViTOptions
from m3ae_fast.weights.importing import read_source
from m3ae_fast.weights.onnx_model import NEEDS, write_onnx
from m3ae_fast.weights.open_model import is_run, run_weights, saved_run
from m3ae_fast.weights.run_card import run_section
from m3ae_fast.weights.timm_folder import write_timm

Format = Literal["m3ae", "timm", "onnx"]
Weights = Literal["average", "last"]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format = "m3ae",
    weights: Weights = "average",
    tokenizer: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
    pool: Pool | None = None,
    push: str | None = None,
) -> Pretrained | VQGAN:
    """Write the weights of `source` in another format, in float32, and return what was written: a model or, if `source`
    is a .msgpack file, an image tokenizer.

    Args:
        source: a run folder (its last checkpoint), a checkpoint, an export, or a file, folder or Hugging Face Hub name
            of weights of other programs; `m3ae-fast convert --help` lists the supported kinds. No code in the files is
            executed.
        out: a new folder, or an earlier export, which is replaced; for "onnx", the file to write.
        format: "m3ae" for a folder that `load_model` reads, "timm" for the image encoder as timm's VisionTransformer,
            or "onnx" for the image encoder as an ONNX file.
        weights: for a run with `train.ema`, the weights to write: the moving "average" or the "last" ones.
        tokenizer: the tokenizer.json, BERT vocab.txt or Hub name of the captions' tokenizer; None: the tokenizer of
            `source`, if it has one.
        num_heads: number of attention heads of the encoder, or of encoder and decoder, for a .pth or .safetensors file
            whose width is not that of a published size.
        pool: pooling of images that the written model uses by default (`model.pool`); None: that of `source`. timm
            has no "grid2" or "grid4": with the format "timm", "mean" replaces them.
        push: name, OWNER/NAME, under which the folder is also uploaded to the Hugging Face Hub.

    Raises:
        UserError: the source is unknown or damaged, the tokenizer does not fit, an argument is invalid, arguments
            cannot be combined, a library is missing, or the result cannot be written or uploaded.
    """
    choices = (("format", format, get_args(Format)), ("weights", weights, get_args(Weights)), ("pool", pool, POOLS))
    for argument, value, allowed in choices:
        if value not in allowed and not (argument == "pool" and value is None):
            raise UserError(f"{argument} {value}: must be one of {', '.join(allowed)}")
    name, folder = os.fspath(source), os.fspath(out)
    if Path(name).suffix == ".msgpack":
        if format != "m3ae" or push:
            raise UserError(f"{name}: an image tokenizer has only one format; leave out format and push")
        return convert_vqgan(name, folder)
    if push and format == "onnx":
        raise UserError("push uploads a folder, but format onnx writes a file; leave out push")
    if format == "onnx":
        require_libraries(NEEDS)
    found, about = _read(name, weights == "average", num_heads)
    if tokenizer:
        sizes = found.config.text_length, found.config.vocab_size
        found = replace(found, tokenizer=load_tokenizer(tokenizer, *sizes, label="tokenizer"))
    if pool:
        found = replace(found, config=found.config.model_copy(update={"pool": pool}))
    if format == "timm" and POOLINGS[found.config.pool].timm is None:
        note = f"timm has no pooling {found.config.pool}: the written model computes the mean over the patches instead"
        found = replace(found, config=found.config.model_copy(update={"pool": "mean"}), notes=(*found.notes, note))
    if format != "m3ae" and found.config.resize == "native":
        size = found.config.image_size
        square = f"this format accepts only square images of {size} x {size} pixels; other images need format m3ae"
        found = replace(found, notes=(*found.notes, square))
    if format == "onnx":
        write_onnx(folder, found.config, found.state)
    elif format == "timm":
        write_timm(folder, found.config, found.state)
    else:
        write_pretrained(folder, found, model_card(push or Path(folder).resolve().name, found.config, about))
    if push:
        found = replace(found, notes=(*found.notes, f"uploaded to {push_folder(folder, push)}"))
    return found


def _read(source: str, average: bool, num_heads: int | tuple[int, int] | None) -> tuple[Pretrained, str]:
    """Return the weights, and a section about their origin for the model card. `average`: whether to return the moving
    average of a run's weights if there is one. Raises UserError as `convert` does."""
    path = Path(source)
    if is_run(path):
        saved = saved_run(path)
        return run_weights(saved, average=average), run_section(saved, average)
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads, None)
    found = read_source(source, ViTOptions(*heads))
    return found, f"Converted from: {found.kind}.\n"
