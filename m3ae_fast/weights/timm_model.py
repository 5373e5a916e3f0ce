"""Opening of timm's vision models by the names that `compare` and teachers accept: `timm:NAME` and `timm:NAME=FILE`,
with `NAME@SIDE` in place of NAME for images of another size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library
from m3ae_fast.weights.importing import read_weights
from m3ae_fast.weights.model_name import TIMM

_LARGEST = 4096  # maximum side of the images in pixels


class TimmModel(NamedTuple):
    """A timm model without its classifier, on the CPU and in evaluation mode, and the images that it expects."""

    network: Any
    name: str  # name of the architecture and of the weights in timm
    side: int  # height and width of the images in pixels
    channels: int
    mean: tuple[float, ...]  # by channel, with black = 0 and white = 1
    std: tuple[float, ...]


def open_timm_model(name: str) -> TimmModel:
    """Return a timm model, with the size and the normalisation of the images with which it was trained.

    Args:
        name: "timm:NAME" for a model whose weights timm downloads, or "timm:NAME=FILE" for weights from a file, which
            must be a safetensors file or a torch file that can be read with `weights_only`. "NAME@SIDE" in place of
            NAME is the model for images of SIDE x SIDE pixels; the position embeddings of a ViT are interpolated.

    Raises:
        UserError: timm is not installed or does not know the model, the weights cannot be loaded or belong to another
            model, or the images are not square.
    """
    timm = library("timm", name)
    own, _, file = name.removeprefix(TIMM).partition("=")
    before, _, size = own.rpartition("@")
    own, wanted = (before, int(size)) if before and size.isdecimal() else (own, None)
    if wanted is not None and not 0 < wanted <= _LARGEST:
        raise UserError(f"{name}: the size of the images, {wanted} pixels, must be from 1 to {_LARGEST:,}")
    try:
        network = timm.create_model(own, pretrained=not file, num_classes=0)
    except Exception as error:  # timm and the libraries for downloads raise many kinds of errors
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{name}: timm cannot open the model {own} ({reason})") from None
    if file:
        _load(network, read_weights(file), name)
    about: dict[str, Any] = network.pretrained_cfg
    channels, side, columns = about["input_size"]
    if side != columns:
        raise UserError(f"{name}: its images of {side} x {columns} pixels are not square, which is not supported")
    if wanted not in (None, side) and hasattr(network, "set_input_size"):
        _try(lambda: network.set_input_size(img_size=wanted), name, wanted)
    return TimmModel(network.eval(), own, wanted or side, channels, tuple(about["mean"]), tuple(about["std"]))


def output_of(model: TimmModel, forward: Callable[[Tensor], Tensor], where: str) -> Tensor:
    """Return the output of a function of the model for one black image. Raises UserError, whose message begins with
    `where`, if the model does not accept images of this size."""
    with torch.no_grad():
        black = torch.zeros(1, model.channels, model.side, model.side)
        return _try(lambda: forward(black), where, model.side)


def _try(call: Callable[[], Any], where: str, side: int | None) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{where}: the model does not accept images of {side} x {side} pixels ({reason})") from None


def _load(network: Any, weights: dict[str, Tensor], name: str) -> None:
    """Load weights into a network without a classifier. Raises UserError unless they are those of this network; a
    classifier in the file is left out."""
    own, about = network.state_dict(), network.pretrained_cfg
    heads = about.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for key in own:
        if key not in weights:
            raise UserError(f"{name}: the file lacks the weight {key} of this model")
        if weights[key].shape != own[key].shape:
            shapes = f"{[*weights[key].shape]}, not {[*own[key].shape]}"
            raise UserError(f"{name}: the weight {key} in the file has the shape {shapes}")
    for key in weights.keys() - own.keys():
        if not any(key.startswith(f"{head}.") for head in heads):
            raise UserError(f"{name}: the file has a weight {key}, which this model does not have")
    network.load_state_dict({key: weights[key] for key in own})
