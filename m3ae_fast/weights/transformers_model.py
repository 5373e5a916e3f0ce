"""Opening of the vision models of Hugging Face's transformers by the names on the command line:
`transformers:OWNER/NAME` and `transformers:FOLDER`, with `@REVISION`, `@SIDE` or both after them."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import hub_answers, is_hub_name
from m3ae_fast.base.libraries import library
from m3ae_fast.weights.library_model import LibraryModel, accepting, normalisation, reason
from m3ae_fast.weights.model_name import TRANSFORMERS, split_side


class _Features(nn.Module):
    """A model of transformers with the interface of timm (see `LibraryModel`). The vector of an image is its first
    token if there are tokens that do not describe patches, as in DINOv2, and otherwise the mean of its last features.
    Poolers of transformers are not used: most of them were not trained together with the network."""

    def __init__(self, network: Any, side: int, name: str) -> None:
        """`side`: height and width of the images in pixels. Raises UserError, whose message begins with `name`, if the
        model computes no features of such an image, or if two calls compute different features."""
        super().__init__()
        self.network, config = network, network.config
        self._size: dict[str, bool] = {}
        if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
            self._size = {"interpolate_pos_encoding": side != getattr(config, "image_size", side)}
        # all patches of this image differ, so that the features change if the model reads other patches of it
        image = torch.linspace(-1, 1, config.num_channels * side**2).reshape(1, config.num_channels, side, side)
        with torch.no_grad():
            first, again = (accepting(lambda: self.forward_features(image), name, side) for _ in range(2))
        if not isinstance(first, Tensor) or first.ndim not in (3, 4):
            raise UserError(f"{name}: {type(network).__name__} returns no features of patches (last_hidden_state)")
        if not torch.equal(first, again):
            raise UserError(
                f"{name}: {type(network).__name__} computes different features each time, because it masks patches at "
                "random; use another class of the same weights, or timm's version of the model"
            )
        self.num_features = first.shape[1 if first.ndim == 4 else 2]
        self.num_prefix_tokens = 0
        if first.ndim == 3:
            tokens, patch = first.shape[1], getattr(config, "patch_size", None)
            given = [tokens - (side // patch) ** 2] if isinstance(patch, int) else []
            possible = [count for count in [*given, 0, 1] if 0 <= count < tokens and _is_square(tokens - count)]
            self.num_prefix_tokens = next(iter(possible), 0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last features of images: a map [B, K, h, w] or tokens [B, N, K]."""
        found: Any = getattr(self.network(pixel_values=images, **self._size), "last_hidden_state", None)
        return found

    def forward_intermediates(self, images: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the last features of images, and the outputs of the stages or blocks `indices`."""
        found = self.network(pixel_values=images, output_hidden_states=True, **self._size)
        return found.last_hidden_state, [found.hidden_states[index] for index in indices]

    def forward(self, images: Tensor) -> Tensor:
        found = self.forward_features(images)
        if found.ndim == 4:
            return found.mean((2, 3))
        return found[:, 0] if self.num_prefix_tokens else found.mean(1)


def open_transformers_model(name: str) -> LibraryModel:
    """Return a vision model of transformers, with the size and the normalisation of its image processor. For a model
    of images and texts, such as CLIP, only its image encoder is returned.

    Args:
        name: "transformers:OWNER/NAME" for a model that transformers downloads from the Hub, or "transformers:FOLDER"
            for a folder that `save_pretrained` of the model and of its image processor has written.
            "OWNER/NAME@REVISION" is a branch, tag or commit of the model, and "NAME@SIDE" the model for images of SIDE
            x SIDE pixels; the position embeddings of a ViT are interpolated.

    Raises:
        UserError: transformers is not installed; the images are not square; or the model cannot be opened, needs code
            of its own, lacks weights, lacks the description of its images, or is not a vision model.
    """
    transformers = library("transformers", name)
    own, wanted = split_side(name.removeprefix(TRANSFORMERS), name)
    source, given = own, {}
    if not os.path.isdir(own):
        source, at, revision = own.partition("@")
        if not is_hub_name(source):
            raise UserError(
                f"{name}: no such folder; specify a folder, or a model on the Hub as {TRANSFORMERS}owner/name"
            )
        given = {"local_files_only": not hub_answers(source)} | ({"revision": revision} if at else {})
    with _quiet(transformers):
        try:
            model, loaded = transformers.AutoModel.from_pretrained(
                source,
                **given,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,  # no code from the repository is run, not even from a pickle
                weights_only=True,
            )
        except Exception as error:  # transformers and the libraries for downloads raise many kinds of errors
            raise UserError(f"{name}: transformers cannot open the model ({reason(error)})") from None
        try:
            images, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source, **given)
        except Exception:
            raise UserError(
                f"{name}: no preprocessor_config.json describes its images; call save_pretrained of the model's image "
                "processor too"
            ) from None
    if missing := sorted(key for key in loaded["missing_keys"] if "pooler" not in key.split(".")):
        raise UserError(f"{name}: its files lack {len(missing)} of the weights, for example {missing[0]}")
    network = getattr(model, "vision_model", model)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # its weights may be random
    channels = getattr(network.config, "num_channels", None)
    if channels is None:
        raise UserError(f"{name}: {type(model).__name__} is not a vision model")
    factor = images.get("rescale_factor", 1 / 255) if images.get("do_rescale", True) else 1
    if not isinstance(factor, float) or not math.isclose(255 * factor, 1, rel_tol=1e-3):
        raise UserError(
            f"{name}: its preprocessor_config.json rescales values by {factor!r}; only 1 / 255 is supported"
        )
    mean, std = (0.0,) * channels, (1.0,) * channels
    if images.get("do_normalize", True):
        mean, std = normalisation(images, ("image_mean", "image_std"), channels, name)
    side = wanted or _side(images, name)
    features = _Features(network.eval().requires_grad_(False), side, name)
    return LibraryModel(features.eval(), f"transformers' {type(network).__name__}", side, channels, mean, std)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Switch off the progress bars and the reports that transformers prints while it loads weights."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _side(images: dict[str, Any], name: str) -> int:
    """Return the height and width of the images that an image processor returns, in pixels."""
    size = images.get("size")
    if images.get("do_center_crop") and images.get("crop_size"):
        size = images["crop_size"]
    if isinstance(size, dict):
        sides = [size[key] for key in ("height", "width", "shortest_edge") if size.get(key)]
    else:
        sides = [size]
    side = sides[0] if sides and sides == sides[:1] * len(sides) else None
    if not isinstance(side, int) or side < 1:
        raise UserError(
            f"{name}: its preprocessor_config.json describes no square images (size {size!r}); write NAME@SIDE"
        )
    return side


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
