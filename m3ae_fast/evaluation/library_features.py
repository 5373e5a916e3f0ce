"""Features of the vision models of timm and transformers, by their names on the command line."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import ModelConfig
from m3ae_fast.evaluation.image_features import ImageFeatures, image_features
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.weights.library_model import output_of
from m3ae_fast.weights.model_name import IMAGE_FEATURES
from m3ae_fast.weights.open_library_model import open_library_model

_LARGEST_PATCH = 32  # maximum patch size of the input; it affects only how images are packed


class LibraryFeatures(ImageFeatures):
    """The vectors that a model of timm or transformers computes for images. The images have the size with which the
    model was trained, and are normalised with the mean and the standard deviation of its training."""

    def __init__(self, config: ModelConfig, network: nn.Module, width: int) -> None:
        super().__init__(config)
        self.network, self._width = network, width

    @property
    def width(self) -> int:
        return self._width

    @property
    def digest(self) -> str:
        """Return a hash of the weights, followed by the config as JSON."""
        return f"{weights_digest(self.state_dict())} {self.config.model_dump_json()}"

    @property
    def parameters_of_network(self) -> int:
        """Return the number of parameters."""
        return sum(each.numel() for each in self.network.parameters())

    def features(self, images_SCHW: Tensor) -> Tensor:
        found_SD: Tensor = self.network(normalised(images_SCHW, self.config.image_mean, self.config.image_std).float())
        return found_SD


def open_fixed_features(name: str, config: ModelConfig) -> ImageFeatures:
    """Return the image features called `name` on the CPU, in evaluation mode. `name`: a kind of fixed features, or a
    model of timm or transformers. `config`: how the image files are read; see `image_features.input_config`. Raises
    UserError as `open_library_features` and `image_features` do."""
    return image_features(name, config) if name in IMAGE_FEATURES else open_library_features(name, config)


def open_library_features(name: str, config: ModelConfig) -> LibraryFeatures:
    """Return a model of timm or transformers on the CPU, in evaluation mode.

    Args:
        name: as in `open_library_model`.
        config: how the image files are read; see `image_features.input_config`.

    Raises:
        UserError: as in `open_library_model`, or if the model rejects images of the size that its own config states, or
            does not compute one vector per image.
    """
    opened = open_library_model(name)
    side = opened.side
    patch = max(each for each in range(1, min(side, _LARGEST_PATCH) + 1) if side % each == 0)
    changes: dict[str, Any] = {"image_size": side, "patch_size": patch, "channels": opened.channels}
    changes |= {"image_mean": opened.mean, "image_std": opened.std}
    given = config.model_copy(update=changes)
    found_SD = output_of(opened, opened.network, name)
    if found_SD.ndim != 2:
        raise UserError(f"{name}: computes features of the shape {[*found_SD.shape[1:]]}, not one vector per image")
    return LibraryFeatures(given, opened.network, found_SD.shape[1]).eval()
