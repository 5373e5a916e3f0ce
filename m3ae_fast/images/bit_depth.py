"""Converts high-bit-depth, signed and floating-point pixel values to the model's pixels, using a value range."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample, NeedsRange
from m3ae_fast.config import Range

_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339  # tags of TIFF
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # type of the values by TIFF's SampleFormat
# bit depths by Pillow's mode, for files without further information
_MODES = {
    "I": ("signed", 32),
    "F": ("float", 32),
}


class Depth(NamedTuple):
    """The bit depth of an image file: the type and the number of bits of a value."""

    kind: str
    bits: int
    white_is_zero: bool = False

    @property
    def is_deep(self) -> bool:
        """Return whether the bit depth is high, which means that the values are not integers from 0 to 255."""
        return self.kind != "unsigned" or self.bits > 8

    @property
    def limits(self) -> tuple[float, float]:
        """Return the lowest and the highest possible value; 0 and 1 for floats."""
        if self.kind == "float":
            return 0.0, 1.0
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.kind == "signed" else (0, 2 * half - 1)

    def __str__(self) -> str:
        return f"{self.kind} {self.bits}-bit values"


def depth_of(image: Image.Image) -> Depth:
    """Return the bit depth of an image whose pixels have not been loaded yet. After loading, the image no longer shows
    that Pillow has reduced 16-bit colours to 8 bits."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        kind = _KINDS.get(tags.get(_FORMAT, (1,))[0], "unknown")
        return Depth(kind, max(tags.get(_BITS, (1,))), tags.get(_PHOTOMETRIC) == 0)
    if image.mode.startswith("I;16") or any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return Depth("unsigned", 16)
    return Depth(*_MODES.get(image.mode, ("unsigned", 8)))


def deep_grey(image: Image.Image, depth: Depth, value_range: Range | None, channels: int, dtype: str) -> np.ndarray:
    """Return a one-channel high-bit-depth image as pixels of `dtype`: [1, H, W] with transparent pixels in white, or
    [4, H, W] with alpha if `channels` is 4. Raises BadSample if a value is not finite, or if `channels` is 4 and
    `dtype` is not "uint8"."""
    if channels == 4 and dtype != "uint8":
        raise BadSample(f"the image has one channel of {depth}, but the model expects 4")
    values, clear = grey_values(image, depth), image.info.get("transparency")
    lit = scaled(values, depth, value_range)
    opaque = np.full(values.shape, True) if clear is None else values != clear
    planes = (lit, lit, lit, opaque) if channels == 4 else (np.where(opaque, lit, 1.0),)
    return as_pixels(np.stack(planes), dtype)


def check_colours(image: Image.Image, depth: Depth, value_range: Range | None, dtype: str) -> None:
    """Raise BadSample unless the 8 bits that Pillow keeps of high-bit-depth colours are accurate to within one
    level."""
    if dtype != "uint8":
        raise BadSample(
            f"the image has colour channels of {depth}, of which Pillow reads only 8 bits; store it as TIFF or .npy"
        )
    if value_range != "dtype" or depth.kind != "unsigned":
        raise BadSample(
            f'the image has colour channels of {depth}, which can be read only with model.value_range "dtype"'
        )
    if image.info.get("transparency") is not None:
        raise BadSample(f"the image has colour channels of {depth} and a transparent colour, which is not supported")


def require_range(depth: Depth, value_range: Range | None) -> None:
    """Raise NeedsRange if there is no range."""
    if value_range is None:
        raise NeedsRange(str(depth))


def scaled(values: np.ndarray, depth: Depth, value_range: Range | None) -> np.ndarray:
    """Return float64 values of any shape, scaled so that black is 0 and white is 1."""
    assert value_range is not None
    low, high = depth.limits if value_range == "dtype" else value_range
    lit = (values - low) / (high - low)
    return 1 - lit if depth.white_is_zero else lit


def as_pixels(lit: np.ndarray, dtype: str) -> np.ndarray:
    """Return floating-point values of any shape, in which black is 0 and white is 1, as pixels of the model's dtype
    (`model.image_dtype`). Values for integer dtypes are rounded and clipped; those for float32 are not."""
    if dtype == "float32":
        return lit.astype(np.float32)
    return np.rint(np.iinfo(dtype).max * lit.clip(0, 1)).astype(dtype)


def bands_to_pixels(values: np.ndarray, value_range: Range | None, dtype: str) -> np.ndarray:
    """Return an array's values, of any shape and with a dtype of `bands.DTYPES`, as pixels of `dtype`. Values of dtype
    uint8 are levels from 0 to 255 for any range. Raises BadSample if no range is set for other dtypes."""
    kind, bits = ("float", 32) if values.dtype == np.float32 else ("unsigned", 8 * values.itemsize)
    depth = Depth(kind, bits)
    if depth.is_deep:
        require_range(depth, value_range)
    is_whole = not depth.is_deep or value_range in ("dtype", depth.limits)
    if is_whole and values.dtype == dtype:
        return values
    return as_pixels(scaled(values.astype(np.float64), depth, "dtype" if is_whole else value_range), dtype)


def grey_values(image: Image.Image, depth: Depth) -> np.ndarray:
    """Return the values of a high-bit-depth image with one channel, float64 [H, W]. Raises BadSample if a value is not
    finite.

    Pillow has no mode for uint32 and int8, but keeps the bits of their values.
    """
    values = np.asarray(image)
    if (depth.kind, depth.bits) == ("unsigned", 32):
        values = values.view(np.uint32)
    elif (depth.kind, depth.bits) == ("signed", 8):
        values = values.view(np.int8)
    if depth.kind == "float" and not np.isfinite(values).all():
        raise BadSample("the image has values that are not finite")
    return values.astype(np.float64)
