"""Converts images and texts, which may have various forms, to unmasked samples.

Shapes: C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample, NeedsRange
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.batch.packing import Geometry, Sample
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import ModelConfig
from m3ae_fast.images.bands import checked
from m3ae_fast.images.bit_depth import as_pixels
from m3ae_fast.images.crops import whole_view
from m3ae_fast.images.decoding import decode_image, pixels_of, pixels_of_bands, widened
from m3ae_fast.images.normalisation import from_unit, model_input

OneImage: TypeAlias = "Image | Tensor | np.ndarray | str | os.PathLike[str]"  # see `prepare_image`
# Values of black and white in floating-point images, or "normalised" for images that are normalised by the model's mean
# and standard deviation; None: the default of the called function.
ValueRange: TypeAlias = 'tuple[float, float] | Literal["normalised"] | None'
_MOST_DEVIATIONS = 20.0  # plausible maximum of a normalised image that has no values below 0
# maximum fraction of values that may be out of range by more than the width of the range; allows for a few bright
# pixels
_OTHER_UNITS = 0.1
# if white is at least this value, pixels should be integer levels, so fractions from 0 to 1 are implausible
_LEVELS = 100


def as_images(images: OneImage | Sequence[OneImage], channels: int) -> Sequence[OneImage]:
    """Return the images as a sequence; a single image becomes a list of one. A tensor or an array with four dimensions
    is treated as several images. If `channels` is 1, an array with three dimensions is also treated as several images,
    unless one of its dimensions can be that of the channels. Raises ValueError for any other array with three
    dimensions whose last one cannot be that of the channels, because it may be one image with its channels first."""
    if isinstance(images, (str, os.PathLike, Image)):
        return [images]
    if isinstance(images, np.ndarray):
        is_one = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 2, 3, 4, channels))
        if not is_one and images.ndim == 3 and (channels != 1 or len(images) in (3, 4)):
            layout = f"height, width, {channels}" if channels > 1 else "height, width"
            several = "" if channels > 1 else f"; if it contains {len(images)} images, pass list(x)"
            raise ValueError(
                f"an array of shape {list(images.shape)} is not an image [{layout}]: "
                f"if the channels come first, pass x.transpose(1, 2, 0){several}"
            )
        return [images] if is_one else list(images)
    return [images] if isinstance(images, Tensor) and images.ndim <= 3 else images  # type: ignore[return-value]


def check_values(images: Iterable[OneImage], value_range: ValueRange, config: ModelConfig) -> None:
    """Raise ValueError if `value_range` is invalid or evidently wrong for the images. If `value_range` is None,
    floating-point tensors must be normalised. The error is then raised for values that evidently are not normalised,
    such as values from 0 to 1 or from 0 to 255; no error is raised if all images are constant. If `value_range` gives
    the values of black and white, it is checked by `_check_units`."""
    if value_range is not None:
        if isinstance(value_range, str):
            is_valid = value_range == "normalised"
        else:
            is_pair = isinstance(value_range, (tuple, list)) and len(value_range) == 2
            are_numbers = is_pair and all(isinstance(each, Real) for each in value_range)
            is_valid = are_numbers and value_range[0] < value_range[1]
        if not is_valid:
            raise ValueError(
                f"value_range {value_range!r}: must be (black, white) with black below white, such as (0, 1), "
                'or "normalised"'
            )
        if not isinstance(value_range, str):
            _check_units(images, value_range)
        return
    floating = [x.detach() for x in images if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    spans = torch.tensor([[x.min().item(), x.max().item()] for x in floating]).view(-1, 2)
    if not (spans[:, 0] < spans[:, 1]).any():
        return
    low, high = spans[:, 0].min().item(), spans[:, 1].max().item()
    # if the mean is 0 and the standard deviation is 1, normalised pixels are also pixels from 0 to 1
    is_same = not any(config.image_mean) and {*config.image_std} == {1.0}
    is_unit = high <= 1 and not is_same
    if low < 0 or not (is_unit or high > _MOST_DEVIATIONS):
        return
    guess = (0, 1) if is_unit else (0, 255 if high <= 255 else 65535)
    raise ValueError(
        f"floating-point images are expected to be normalised, (x - mean) / std, but these have values from {low:.3g} "
        f"to {high:.3g}: if these are the values of black and white, pass value_range={guess}; if the images are "
        'normalised, pass value_range="normalised"; otherwise, pass uint8 images'
    )


def _check_units(images: Iterable[OneImage], value_range: tuple[float, float]) -> None:
    """Raise ValueError if floating-point tensors, or arrays with more than 8 bits per value, evidently have other units
    than `value_range`. This is evident if many values lie far outside the range and would be clipped, or if all values
    lie in [0, 1] although the range is that of integer levels."""
    low, high = value_range
    size = beyond = 0
    spans, is_whole = [], True
    for x in images:
        if isinstance(x, np.ndarray) and x.dtype in (np.uint16, np.float32, np.float64):
            values = torch.from_numpy(x.astype(np.float64))
        elif isinstance(x, Tensor) and x.is_floating_point():
            values = x.detach().double()
        else:
            continue
        if not values.numel() or not values.isfinite().all():  # non-finite values are reported elsewhere
            continue
        size += values.numel()
        beyond += int(((values > high + (high - low)) | (values < low - (high - low))).sum())
        spans += [values.min().item(), values.max().item()]
        is_whole = is_whole and not (values % 1).any()
    if not size:
        return
    fractions = low <= 0 and high >= _LEVELS and min(spans) >= 0 and max(spans) <= 1 and not is_whole
    if fractions or beyond > _OTHER_UNITS * size:
        raise ValueError(
            f"value_range={tuple(value_range)} sets the values of black and white, but these images have values from "
            f"{min(spans):.3g} to {max(spans):.3g}: pass the values of black and white in these images, or "
            'value_range="normalised" if the images are normalised, (x - mean) / std'
        )


def check_present(images: Sequence[OneImage | None] | None, texts: Sequence[str | None] | None) -> None:
    """Raise ValueError if an image is None or a text is not a string, because the sample would otherwise be encoded
    without the image or the text."""
    for what, values, kind in (("image", images, object), ("text", texts, str)):
        for number, value in enumerate(values if values is not None else ()):
            if value is None or not isinstance(value, kind):
                found = f"{what} {number} is {type(value).__name__}"
                raise ValueError(f"{found}: pass one {what} for each sample, or {what}s=None if there are no {what}s")


def unmasked_sample(
    number: int,
    image: OneImage | None,
    text: str | None,
    config: ModelConfig,
    tokenizer: CaptionTokenizer | None,
    value_range: ValueRange = None,
) -> Sample:
    """Return an unmasked sample of an image, a text or both. A text requires the tokenizer. Raises ValueError and
    UserError as `prepare_image` does, and ValueError if the tokenizer fails on the text. `number`: a number that
    becomes the key of the sample, as text."""
    sample = Sample(str(number))
    if image is not None:
        sample.image = prepare_image(image, config, value_range)
        rows, columns = Geometry.of(config).grid(sample.image)
        sample.image_mask = torch.zeros(rows * columns, dtype=torch.bool)
    if text is not None:
        assert tokenizer is not None
        try:
            sample.tokens = torch.from_numpy(tokenizer.encode(text))
        except BadSample as error:
            raise ValueError(f"the text cannot be used: {error}") from None
        sample.text_mask = torch.zeros(len(sample.tokens), dtype=torch.bool)
    return sample


def prepare_image(image: OneImage, config: ModelConfig, value_range: ValueRange = None) -> Tensor:
    """Return an image as [C, image_size, image_size], or [C, H, W] for a model with native aspect ratio, on the CPU.
    The pixels have the model's image_dtype, or are normalised and have a floating-point dtype.

    Args:
        image: one of the following: the path of a file, which is read like an image in a shard; a PIL image; an array
            [H, W, C] or [H, W], which is read like a .npy file; a tensor [C, H, W] of dtype uint8 (or uint16 if that is
            the model's image_dtype), which is cropped to the central square unless the model has native aspect ratio; a
            floating-point tensor.
        value_range: value range of floating-point tensors and arrays, and of files, PIL images and arrays with more
            than 8 bits per value. With (black, white), such as (0, 1), it replaces the model's value_range. The image
            may then have any size and is read like a file; if it must be resized, its values are first converted to the
            model's image_dtype. With "normalised", the image must already be normalised by the model's image_mean and
            image_std, and must have the shape [C, image_size, image_size] or, for native aspect ratio, sides that are
            multiples of the patch size. None: "normalised" for tensors, and the model's value_range for all other
            images.

    Raises:
        ValueError: the image cannot be used, or does not fit the model.
        UserError: the file cannot be read.
    """
    channels = config.channels
    if isinstance(value_range, (tuple, list)):
        config = config.model_copy(update={"value_range": tuple(value_range)})
    if isinstance(image, (str, os.PathLike)):
        return _read_image(image, config)
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim in (2, 3):
        if value_range is not None:
            image = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)))
        elif config.value_range is None:
            raise ValueError(
                f"the image cannot be used: arrays of {image.dtype} require value_range=(black, white), such as "
                '(0, 1), or "normalised"'
            )
    kind = channels, config.value_range, config.image_dtype
    if isinstance(image, (Image, np.ndarray)):
        try:
            pixels = pixels_of(image, *kind) if isinstance(image, Image) else pixels_of_bands(checked(image), *kind)
        except BadSample as error:
            is_first = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[0] == channels
            hint = "; x.transpose(1, 2, 0) moves its channels to the end" if is_first else _converted(image, channels)
            raise ValueError(f"the image cannot be used: {_of_call(error)}{hint}") from None
        return _prepared(pixels, config)
    if not isinstance(image, Tensor):
        raise ValueError(f"images must be paths, PIL images, arrays or tensors, not {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] != channels or not image.numel():
        is_last = image.ndim == 3 and image.shape[2] == channels
        hint = "; x.permute(2, 0, 1) moves its channels to the front" if is_last else ""
        raise ValueError(f"the image has shape {list(image.shape)}, but must have [{channels}, height, width]{hint}")
    if image.is_floating_point():
        return _floating(image.cpu(), config, value_range or "normalised")
    if image.dtype not in (torch.uint8, getattr(torch, config.image_dtype)):
        raise ValueError(f"the image has dtype {image.dtype}, but must be {config.image_dtype} or floating-point")
    image = image.cpu()
    return _prepared(widened(image, config.image_dtype) if image.dtype == torch.uint8 else image, config)


class Preprocess:
    """Transform from an image, in any form that `prepare_image` accepts, to the model's input tensor [C, H, W]. Raises
    errors as `prepare_image` and `check_values` do.

    Square tensors can be batched with `torch.stack`. The model itself normalises integer tensors. `M3AE.encode` returns
    the same features for the tensor as for the image.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(self, image: OneImage, value_range: ValueRange = None) -> Tensor:
        check_values([image], value_range, self.config)
        return prepare_image(image, self.config, value_range)

    def __repr__(self) -> str:
        c = self.config
        size = f"{c.image_size} x {c.image_size}" if c.resize == "square" else "native"
        return f"Preprocess({size}, {c.channels} channels, {c.image_dtype})"


def _converted(image: Image | np.ndarray, channels: int) -> str:
    """Return a hint for an array of another colour mode, which is converted if it is passed as a PIL image; "" for
    other images."""
    if isinstance(image, Image) or image.dtype != np.uint8 or image.ndim != 3 or channels not in (1, 3):
        return ""
    return "; pass it as PIL.Image.fromarray(x), which is converted" if image.shape[2] in {3, 4} - {channels} else ""


def _of_call(error: BadSample) -> str:
    """Return the message of an error in words for callers in Python, who have no config."""
    if isinstance(error, NeedsRange):
        how = "pass value_range=(black, white), such as (0, 4095) (for a command: --value-range 0,4095)"
        return f"the image has {error.found}: {how}"
    return str(error)


def _floating(image: Tensor, config: ModelConfig, value_range: tuple[float, float] | Literal["normalised"]) -> Tensor:
    if not image.isfinite().all():
        raise ValueError("the floating-point image has values that are not finite")
    if isinstance(value_range, str):
        try:
            Geometry.of(config).grid(image)
        except ValueError as error:
            raise ValueError(f"{error}; pass value_range=(0, 1) for images of any size") from None
        return image.to(torch.promote_types(image.dtype, torch.float32))
    unit = in_unit(image, value_range)
    seen = _prepared(torch.from_numpy(as_pixels(unit.numpy(), config.image_dtype)), config)
    # if the image already has the model's size, it is not resized, and its values are not rounded
    return from_unit(unit, config.image_mean, config.image_std) if seen.shape == image.shape else seen


def in_unit(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return floating-point images of any shape, rescaled so that black is 0 and white is 1. `value_range`: the values
    of black and white in `images`. The dtype is at least float32, and the operation is differentiable."""
    low, high = value_range
    return (images.to(torch.promote_types(images.dtype, torch.float32)) - low) / (high - low)


def _prepared(pixels: Tensor, config: ModelConfig) -> Tensor:
    return model_input(whole_view(pixels, Geometry.of(config).frame), config.image_mean, config.image_std)


def _read_image(path: str | os.PathLike[str], config: ModelConfig) -> Tensor:
    try:
        with open_regular(os.fspath(path)) as file:
            pixels = decode_image(file.read(), config.channels, config.value_range, config.image_dtype)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from None
    except BadSample as error:
        raise ValueError(f"{os.fspath(path)}: {_of_call(error)}") from None
    return _prepared(pixels, config)
