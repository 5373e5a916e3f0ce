"""A vision model of another library, timm or transformers, and the checks that both libraries need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError


class LibraryModel(NamedTuple):
    """A model without its classifier, on the CPU and in evaluation mode, and the images that it expects.

    The network has the interface of timm: it returns one vector per image, and `forward_features` returns its last
    features, which are a feature map or tokens. `num_features` is their width, and `num_prefix_tokens`, if there is
    such an attribute, the number of tokens that precede those of the patches.
    """

    network: Any
    architecture: str  # with the library, for example "timm's resnet18"
    side: int  # height and width of the images in pixels
    channels: int
    mean: tuple[float, ...]  # by channel, with black = 0 and white = 1
    std: tuple[float, ...]

    def black_image(self) -> Tensor:
        """Return a batch with one image whose values are 0, [1, C, S, S]."""
        return torch.zeros(1, self.channels, self.side, self.side)


def output_of(model: LibraryModel, forward: Callable[[Tensor], Tensor], where: str) -> Tensor:
    """Return the output of a function of the model for one black image. Raises UserError, whose message begins with
    `where`, if the model does not accept images of this size."""
    with torch.no_grad():
        return accepting(lambda: forward(model.black_image()), where, model.side)


def accepting(call: Callable[[], Any], where: str, side: int | None) -> Any:
    """Return the result of `call`. If the call fails, raise UserError. The message begins with `where`, and says that
    the model does not accept images of this size."""
    try:
        return call()
    except Exception as error:  # networks of the libraries raise many kinds of errors
        what = f"the model does not accept images of {side} x {side} pixels ({reason(error)})"
        raise UserError(f"{where}: {what}") from None


def normalisation(
    about: Mapping[str, Any], keys: Sequence[str], channels: int, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of the images by channel, which a config of the library stores as
    `keys`. Raises UserError, whose message begins with `where`, if they are missing or impossible."""
    found = []
    for key in keys:
        value: Any = about.get(key)
        is_list = isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
        if not is_list or len(value) != channels or not all(map(math.isfinite, value)):
            what = f"must be a list with a number for each of its {channels} channels, not {value!r}"
            raise UserError(f"{where}: {key} in its config {what}")
        found.append(tuple(map(float, value)))
    mean, std = found
    if min(std) <= 0:
        raise UserError(f"{where}: {keys[1]} in its config is {[*std]}, but must be positive")
    return mean, std


def reason(error: Exception) -> str:
    """Return the message of an error of a library on one line, with its type if the message is not a sentence."""
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__} {text}".strip())[:300]
