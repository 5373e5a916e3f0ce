"""Import of weights from other programs. The format of a file or folder is detected automatically.

To support the format of another library, add a module next to this one and a branch in `_recognise` or `_read_folder`.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import find_folder
from m3ae_fast.base.output_folder import MODEL_FILE, read_tensors
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_weights, read_pretrained
from m3ae_fast.weights.from_mae_or_timm import ViTOptions, from_vit
from m3ae_fast.weights.from_official_code import read_jax_checkpoint
from m3ae_fast.weights.open_model import is_run, refuse_part, run_weights, saved_run
from m3ae_fast.weights.timm_folder import is_timm_folder, read_timm_folder

_ZIP, _OLD_TORCH = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def read_source(source: str, heads: ViTOptions) -> Pretrained:
    """Detect the format of a file, folder or Hub model, and convert it. Raises UserError if the format is unknown, the
    file is damaged, or the model cannot be represented as an M3AE."""
    try:
        found = _recognise(source, heads)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: cannot be converted ({type(error).__name__}: {reason}); check that it is complete"
        ) from None
    with torch.device("meta"):
        model = M3AE(found.config)
    check_weights(model, found.state, source)
    return found


def _recognise(source: str, heads: ViTOptions) -> Pretrained:
    if not source:
        raise UserError("SOURCE is empty; specify weights: a file, a folder, or a name on the Hub")
    path = find_folder(source)
    if path.is_dir():
        return _read_folder(path, source, heads)
    refuse_part(path, source)
    try:
        with open_regular(path) as file:
            head = file.read(len(_OLD_TORCH))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    if not head:
        raise UserError(f"{source}: is empty")
    if path.suffix == ".safetensors":
        return _read_vit(_read_safetensors(path), {}, heads, source)
    if head.startswith(_ZIP) or head == _OLD_TORCH:
        saved = _read_torch(path)
        weights = _weights_in(saved, f"{source}: is not an MAE checkpoint")
        args = saved.get("args")
        return _read_vit(weights, vars(args) if isinstance(args, argparse.Namespace) else {}, heads, source)
    return read_jax_checkpoint(path)


def _read_folder(path: Path, source: str, heads: ViTOptions) -> Pretrained:
    if is_run(path):
        return run_weights(saved_run(path))
    if is_timm_folder(path):
        return read_timm_folder(path, heads)
    if os.path.lexists(path / MODEL_FILE):  # also if it is a pipe or a broken link, so that the error names it
        return read_pretrained(source)
    refuse_part(path, source)
    raise UserError(f"{source}: the folder contains neither checkpoints nor an exported model")


def _read_vit(weights: dict[str, Tensor], args: dict[str, Any], heads: ViTOptions, source: str) -> Pretrained:
    config, state, notes = from_vit(weights, heads, source)
    notes.append(
        "the model is assumed to work as in MAE: with images normalised by ImageNet's mean and std, and with exact GELU"
    )
    kind, trained = "encoder of an MAE or a timm ViT", None
    if "decoder_embed.weight" in weights:
        trained = bool(args["norm_pix_loss"]) if "norm_pix_loss" in args else None
        norm_pix = "" if trained is None else f"loss.norm_pix={str(trained).lower()}"
        wanted = norm_pix or "loss.norm_pix (true if MAE was trained with --norm_pix_loss, otherwise false)"
        notes.append(f"to continue training with MAE's loss, set loss.per=batch and {wanted}")
        kind = "MAE checkpoint"
    return Pretrained(config, state, norm_pix=trained, kind=kind, notes=tuple(notes))


def read_weights(file: str) -> dict[str, Tensor]:
    """Return a dict from names to the weights and buffers of a file, in their own dtypes. `file`: a safetensors file,
    or a torch file that can be read with `weights_only`. Raises UserError if the file cannot be read or contains no
    weights."""
    try:
        open_regular(file).close()
        if file.endswith(".safetensors"):
            return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{file}: cannot be read ({reason})") from None
    return _weights_in(_read_torch(Path(file)), file)


def _weights_in(saved: Any, where: str) -> dict[str, Tensor]:
    """Return the weights in the content of a torch file. Raises UserError if there are none. `where`: beginning of the
    message."""
    weights = saved.get("model", saved.get("state_dict", saved)) if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{where}: it contains no dictionary of weights")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a safetensors file, or it is damaged ({error})") from None


def _read_torch(path: Path) -> Any:
    """Read a file with `weights_only`, which allows tensors, containers, and the Namespace in MAE's checkpoints."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile files raise many kinds of errors
        named = re.search(r"(?i)unsupported (?:global: GLOBAL|GLOBAL|class|operand) (\S+)", str(error))
        reason = (
            f"it refers to {named[1]}, which is not loaded for security reasons"
            if named
            else (str(error).splitlines() or ["?"])[0][:200]
        )
        raise UserError(f"{path}: cannot be read as torch weights ({reason})") from None
