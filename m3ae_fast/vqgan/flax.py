"""Conversion of the official tokenizer file (flax's msgpack) to this package's VQGAN."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library
from m3ae_fast.model.pretrained import load_weights
from m3ae_fast.vqgan.model import VQGAN, VQGANConfig

_NDARRAY = 1  # flax's msgpack extension code of an array: msgpack of (shape, dtype, bytes)
_PARTS = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2", "Conv_2": "shortcut"}


def convert_vqgan(path: str | Path, out: str | Path) -> VQGAN:
    """Convert the official tokenizer file `path` to safetensors and config.json in the folder `out`, and return the
    VQGAN. Raises UserError if the file is missing, damaged or of another model, msgpack is not installed, or `out`
    cannot be written."""
    vqgan = from_flax(_read_msgpack(Path(path)), str(path))
    vqgan.save_pretrained(out)
    return vqgan


def from_flax(arrays: Mapping[str, np.ndarray], where: str) -> VQGAN:
    """Return the VQGAN with the weights in `arrays`, by flax path ("params/encoder/Conv_0/kernel"). Raises UserError if
    these weights are not those of a VQGAN."""
    try:
        config = _config(arrays)
        vqgan = VQGAN(config)
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{where}: not the weights of a MaskGIT VQGAN ({type(error).__name__}: {error})") from None
    names = {path: _our_name(path, config) for path in arrays}
    unknown = next((path for path, name in names.items() if name is None), None)
    if unknown is not None:
        raise UserError(f"{where}: has {unknown}, which does not exist in a MaskGIT VQGAN")
    for path, array in arrays.items():
        if array.dtype.kind != "f":
            raise UserError(f"{where}: {path} has dtype {array.dtype}, but weights must be floating-point")
    load_weights(vqgan, {str(names[path]): _tensor(array) for path, array in arrays.items()}, where)
    return vqgan


def _config(arrays: Mapping[str, np.ndarray]) -> VQGANConfig:
    """Infer the sizes of the VQGAN from the shapes of its weights."""

    def count(pattern: str) -> int:
        return len({match[0] for path in arrays if (match := re.match(f"params/{pattern}_[0-9]+/", path))})

    # one convolution before the levels, one after them, and one between adjacent levels
    levels = count("decoder/Conv") - 1
    blocks, rest = divmod(count("encoder/ResBlock"), levels + 1)
    if rest or not blocks:
        raise ValueError(f"{count('encoder/ResBlock')} blocks on {levels} levels")
    filters = arrays["params/encoder/Conv_0/kernel"].shape[-1]
    widths = [arrays[f"params/encoder/ResBlock_{i * blocks}/Conv_0/kernel"].shape[-1] for i in range(levels)]
    codes, dim = arrays["params/quantizer/codebook"].shape
    return VQGANConfig(filters, blocks, tuple(width // filters for width in widths), dim, codes)


def _our_name(path: str, config: VQGANConfig) -> str | None:
    """Return the parameter name of a flax path: encoder.blocks.3.conv1.weight for
    params/encoder/ResBlock_3/Conv_0/kernel."""
    if path == "params/quantizer/codebook":
        return "codebook"
    match = re.fullmatch(
        r"params/(encoder|decoder)/(?:ResBlock_(\d+)/)?((?:Conv|GroupNorm)_(\d+))/(kernel|bias|scale)", path
    )
    if match is None:
        return None
    side, block, part, number, kind = match.groups()
    kind = "bias" if kind == "bias" else "weight"
    if block is not None:
        return f"{side}.blocks.{block}.{_PARTS.get(part)}.{kind}"
    if part.startswith("GroupNorm"):
        return f"{side}.norm.{kind}"
    return (
        f"decoder.convs.{number}.{kind}"
        if side == "decoder"
        else f"encoder.conv_{'out' if int(number) else 'in'}.{kind}"
    )


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a float32 tensor. A kernel [height, width, in, out] becomes torch's [out, in, height,
    width]."""
    tensor = torch.from_numpy(np.array(array, dtype=np.float32))
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    msgpack = library("msgpack", str(path))

    def array(code: int, data: bytes) -> Any:
        if code != _NDARRAY:
            raise ValueError(f"unknown extension {code}")
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)

    try:
        return dict(_flatten(msgpack.unpackb(path.read_bytes(), ext_hook=array), ""))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # msgpack raises many kinds of errors on hostile input
        raise UserError(f"{path}: is not a flax msgpack file, or it is damaged ({error})") from None


def _flatten(tree: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, np.ndarray):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{path}/{key}" if path else str(key))
    else:
        raise ValueError(
            f"{path or 'its content'} must be a dictionary or an array, but has type {type(tree).__name__}"
        )
