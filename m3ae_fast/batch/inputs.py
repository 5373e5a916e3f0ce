"""Images and texts of any kind -> samples of which everything is visible.

Shapes: C channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.batch.bands import checked
from m3ae_fast.batch.crops import whole_view
from m3ae_fast.batch.images import decode_image, pixels_of, pixels_of_bands, widened
from m3ae_fast.batch.normal import model_input
from m3ae_fast.batch.packing import Geometry, Sample
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import ModelConfig
from m3ae_fast.errors import UserError
from m3ae_fast.regular_file import open_regular

OneImage: TypeAlias = "Image | Tensor | np.ndarray | str | os.PathLike[str]"  # see `prepare_image`


def as_images(images: OneImage | Sequence[OneImage], channels: int) -> Sequence[OneImage]:
    """Return one image as a list of it, and several as they are: a tensor of four dimensions, an array of four, or of
    three that are not the height, width and channels of an image of a model of `channels`, is several."""
    if isinstance(images, (str, os.PathLike, Image)):
        return [images]
    if isinstance(images, np.ndarray):
        is_one = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 2, 3, 4, channels))
        return [images] if is_one else list(images)
    return [images] if isinstance(images, Tensor) and images.ndim == 3 else images  # type: ignore[return-value]


def unmasked_sample(
    number: int, image: OneImage | None, text: str | None, config: ModelConfig, tokenizer: CaptionTokenizer | None
) -> Sample:
    """Return an image, a text or a pair of them as a sample of which everything is visible; for a text the tokenizer is
    needed. Raises ValueError as `prepare_image` does, and where the tokenizer fails on the text."""
    sample = Sample(str(number))
    if image is not None:
        sample.image = prepare_image(image, config)
        rows, columns = Geometry.of(config).grid(sample.image)
        sample.image_mask = torch.zeros(rows * columns, dtype=torch.bool)
    if text is not None:
        assert tokenizer is not None
        try:
            sample.tokens = torch.from_numpy(tokenizer.encode(text))
        except BadSample as error:
            raise ValueError(f"a text cannot be used: {error}") from None
        sample.text_mask = torch.zeros(len(sample.tokens), dtype=torch.bool)
    return sample


def prepare_image(image: OneImage, config: ModelConfig) -> Tensor:
    """Return [C, image_size, image_size], or of a native model [C, H, W], on the CPU: of the model's image_dtype,
    floats normalised.

    Args:
        image: the path of a file, which is read as one in a shard is, a PIL image, an array [H, W, C] or [H, W], which
            is read as a .npy file of it is, or a tensor [C, H, W], uint8, or uint16 of a model of such images, of which
            the central square is taken, or all; or a floating tensor [C, image_size, image_size], of a native model of
            sides that its patches divide, already normalised.

    Raises:
        ValueError: the image cannot be used, or does not fit the model.
        UserError: the file cannot be read.
    """
    channels, geometry = config.channels, Geometry.of(config)
    if isinstance(image, (str, os.PathLike)):
        return _read_image(image, config)
    kind = channels, config.image_range, config.image_dtype
    if isinstance(image, (Image, np.ndarray)):
        try:
            pixels = pixels_of(image, *kind) if isinstance(image, Image) else pixels_of_bands(checked(image), *kind)
        except BadSample as error:
            raise ValueError(f"an image cannot be used: {error}") from None
        return _prepared(pixels, config)
    if not isinstance(image, Tensor):
        raise ValueError(f"an image is {type(image).__name__}, and no path, PIL image, array or tensor")
    if image.ndim != 3 or image.shape[0] != channels or not image.numel():
        raise ValueError(f"an image has shape {list(image.shape)}, not [{channels}, height, width]")
    if image.is_floating_point():
        try:
            geometry.grid(image)
        except ValueError as error:
            raise ValueError(f"a floating {error}") from None
        if not image.isfinite().all():
            raise ValueError("a floating image has values that are not finite")
        return image.cpu().to(torch.promote_types(image.dtype, torch.float32))
    if image.dtype not in (torch.uint8, getattr(torch, config.image_dtype)):
        raise ValueError(f"an image is {image.dtype}, neither {config.image_dtype} nor floating")
    image = image.cpu()
    return _prepared(widened(image, config.image_dtype) if image.dtype == torch.uint8 else image, config)


def _prepared(pixels: Tensor, config: ModelConfig) -> Tensor:
    return model_input(whole_view(pixels, Geometry.of(config).frame), config.image_mean, config.image_std)


def _read_image(path: str | os.PathLike[str], config: ModelConfig) -> Tensor:
    try:
        with open_regular(os.fspath(path)) as file:
            pixels = decode_image(file.read(), config.channels, config.image_range, config.image_dtype)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from None
    except BadSample as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    return _prepared(pixels, config)
