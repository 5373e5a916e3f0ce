"""Opening of timm's vision models by the names that `compare` and teachers accept: `timm:NAME` and `timm:NAME=FILE`,
with `NAME@SIDE` in place of NAME for images of another size. NAME may be a folder or a repository that timm has
written: `local-dir:FOLDER` or `hf-hub:OWNER/NAME`."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
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
    architecture: str  # its name in timm
    side: int  # height and width of the images in pixels
    channels: int
    mean: tuple[float, ...]  # by channel, with black = 0 and white = 1
    std: tuple[float, ...]

    def black_image(self) -> Tensor:
        """Return a batch with one image whose values are 0, [1, C, S, S]."""
        return torch.zeros(1, self.channels, self.side, self.side)


def open_timm_model(name: str) -> TimmModel:
    """Return a timm model, with the size and the normalisation of the images with which it was trained.

    Args:
        name: "timm:NAME" for a model whose weights timm downloads, or "timm:NAME=FILE" for weights from a file, which
            must be a safetensors file or a torch file that can be read with `weights_only`. NAME is that of a model in
            timm, or "local-dir:FOLDER" or "hf-hub:OWNER/NAME" for a folder or a repository with timm's config.json and
            weights. "NAME@SIDE" in place of NAME is the model for images of SIDE x SIDE pixels; the position embeddings
            of a ViT are interpolated.

    Raises:
        UserError: timm is not installed or does not know the model, the weights cannot be loaded or belong to another
            model, or the images are not square.
    """
    timm = library("timm", name)
    own, equals, file = name.removeprefix(TIMM).partition("=")
    before, _, size = own.rpartition("@")
    own, wanted = (before, int(size)) if before and size.isdecimal() else (own, None)
    if wanted is not None and not 0 < wanted <= _LARGEST:
        raise UserError(f"{name}: the size of the images, {wanted} pixels, must be from 1 to {_LARGEST:,}")
    if equals and not file:  # for example, because the file is a shell variable that is not set
        raise UserError(f"{name}: there is no file after =; to download the weights, write {name[:-1]}")
    if not own:
        raise UserError(f"{name}: there is no name of a model after {TIMM}; timm.list_models() returns all names")
    try:
        # With num_classes=0, timm would ignore that weights are missing.
        network = timm.create_model(own, pretrained=not file)
    except Exception as error:  # timm and the libraries for downloads raise many kinds of errors
        near = [] if ":" in own or timm.is_model(own) else get_close_matches(own, timm.list_models(), n=1)
        meant = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise UserError(f"{name}: timm cannot open the model {own} ({_reason(error)}){meant}") from None
    if hasattr(network, "reset_classifier"):  # otherwise, it has no classifier
        network.reset_classifier(0)
    if file:
        _load(network, read_weights(file), name)
    about: dict[str, Any] = network.pretrained_cfg
    channels, side, columns = about["input_size"]
    mean, std = (_by_channel(about.get(key), channels, f"{name}: {key} in its config") for key in ("mean", "std"))
    if min(std) <= 0:
        raise UserError(f"{name}: std in its config is {[*std]}, but must be positive")
    if side != columns:
        raise UserError(f"{name}: its images of {side} x {columns} pixels are not square, which is not supported")
    if wanted not in (None, side) and hasattr(network, "set_input_size"):
        _try(lambda: network.set_input_size(img_size=wanted), name, wanted)
    images = wanted or side, channels, mean, std
    return TimmModel(network.eval().requires_grad_(False), about["architecture"], *images)


def _by_channel(value: Any, channels: int, what: str) -> tuple[float, ...]:
    """Return a value of a timm config as one finite number per channel. Raises UserError, whose message begins with
    `what`, if it is something else."""
    is_list = isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
    if not is_list or len(value) != channels or not all(map(math.isfinite, value)):
        raise UserError(f"{what} must be a list with a number for each of its {channels} channels, not {value!r}")
    return tuple(map(float, value))


def output_of(model: TimmModel, forward: Callable[[Tensor], Tensor], where: str) -> Tensor:
    """Return the output of a function of the model for one black image. Raises UserError, whose message begins with
    `where`, if the model does not accept images of this size."""
    with torch.no_grad():
        return _try(lambda: forward(model.black_image()), where, model.side)


def _try(call: Callable[[], Any], where: str, side: int | None) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        what = f"the model does not accept images of {side} x {side} pixels ({_reason(error)})"
        raise UserError(f"{where}: {what}") from None


def _reason(error: Exception) -> str:
    """Return the message of an error of timm on one line, with its type if the message is not a sentence."""
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__} {text}".strip())[:300]


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
