"""Features of timm's vision models, which `compare` accepts as `timm:NAME` and `timm:NAME=FILE`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library
from m3ae_fast.config import ModelConfig
from m3ae_fast.evaluation.image_features import ImageFeatures
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.weights.importing import read_weights
from m3ae_fast.weights.model_name import TIMM

_LARGEST_PATCH = 32  # maximum side of the patches of the input, which only determine how images are packed


class TimmFeatures(ImageFeatures):
    """The features that a timm model passes to its classifier. The images have the size, the mean and the standard
    deviation with which the model was trained."""

    def __init__(self, config: ModelConfig, network: nn.Module, width: int) -> None:
        super().__init__(config)
        self.network, self._width = network, width

    @property
    def width(self) -> int:
        return self._width

    @property
    def digest(self) -> str:
        """Return a hash of the weights and of the input."""
        return f"{weights_digest(self.state_dict())} {self.config.model_dump_json()}"

    @property
    def parameters_of_network(self) -> int:
        """Return the number of parameters."""
        return sum(each.numel() for each in self.network.parameters())

    def features(self, images_SCHW: Tensor) -> Tensor:
        found_SD: Tensor = self.network(normalised(images_SCHW, self.config.image_mean, self.config.image_std).float())
        return found_SD


def open_timm(name: str, config: ModelConfig) -> TimmFeatures:
    """Return a timm model on the CPU, in evaluation mode.

    Args:
        name: "timm:NAME" for a model whose weights timm downloads, or "timm:NAME=FILE" for weights from a file, which
            must be a safetensors file or a torch file that can be read with `weights_only`.
        config: how the image files are read; see `image_features.input_config`.

    Raises:
        UserError: timm is not installed or does not know the model, the weights cannot be loaded or belong to another
            model, or the input is not square or the model does not compute one vector per image.
    """
    timm = library("timm", name)
    own, _, file = name.removeprefix(TIMM).partition("=")
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
    patch = max(each for each in range(1, min(side, _LARGEST_PATCH) + 1) if side % each == 0)
    changes = {"image_size": side, "patch_size": patch, "channels": channels}
    given = config.model_copy(update=changes | {"image_mean": tuple(about["mean"]), "image_std": tuple(about["std"])})
    network.eval()
    with torch.no_grad():
        found_SD = network(torch.zeros(1, channels, side, side))
    if found_SD.ndim != 2:
        raise UserError(f"{name}: computes features of the shape {[*found_SD.shape[1:]]}, not one vector per image")
    return TimmFeatures(given, network, found_SD.shape[1]).eval()


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
