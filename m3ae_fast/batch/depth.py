"""Values of more than 8 bits, signed ones and floats -> levels 0 to 255, as a range says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.config import Range

_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339  # of TIFF
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # by TIFF's SampleFormat
_MODES = {"I": ("signed", 32), "F": ("float", 32)}  # Pillow's, where no file says more


class Depth(NamedTuple):
    """How a file stores a value."""

    kind: str
    bits: int
    white_is_zero: bool = False

    @property
    def is_deep(self) -> bool:
        """Return whether a value is more than a level from 0 to 255."""
        return self.kind != "unsigned" or self.bits > 8

    @property
    def limits(self) -> tuple[float, float]:
        """Return the lowest and the highest value; 0 and 1 for floats."""
        if self.kind == "float":
            return 0.0, 1.0
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.kind == "signed" else (0, 2 * half - 1)

    def __str__(self) -> str:
        return f"{self.kind} {self.bits}-bit values"


def depth_of(image: Image.Image) -> Depth:
    """Return the depth of an image that is not loaded yet: once it is, Pillow hides that it cut 16-bit colours to 8
    bits."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        kind = _KINDS.get(tags.get(_FORMAT, (1,))[0], "unknown")
        return Depth(kind, max(tags.get(_BITS, (1,))), tags.get(_PHOTOMETRIC) == 0)
    if image.mode.startswith("I;16") or any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return Depth("unsigned", 16)
    return Depth(*_MODES.get(image.mode, ("unsigned", 8)))


def levels(image: Image.Image, depth: Depth, image_range: Range | None) -> Image.Image:
    """Return a deep image in 8 bits: each value is scaled, rounded to the nearest level, and clipped.

    Colours of 16 bits, of which Pillow keeps 8, are taken as they are where the range is that of their type: within a
    level of the value. Where a value stands for transparency the result has alpha.

    Raises:
        BadSample: there is no range, colours would need another one than their type's, or a value is not finite.
    """
    if image_range is None:
        raise BadSample(
            f"has {depth}: set data.range to what is black and white in it, such as [0, 4095] (--range 0,4095), or to "
            '"dtype"'
        )
    if len(image.getbands()) > 1:
        if image_range != "dtype" or depth.kind != "unsigned":
            raise BadSample(f'has colours of {depth}, which are read with data.range "dtype" alone')
        if image.info.get("transparency") is not None:
            raise BadSample(f"has colours of {depth}, one of them transparent, which is not read")
        return image
    values = _values(image, depth)
    low, high = depth.limits if image_range == "dtype" else image_range
    lit = ((values - low) / (high - low)).clip(0, 1)
    if depth.white_is_zero:
        lit = 1 - lit
    grey = Image.fromarray(np.rint(255 * lit).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _values(image: Image.Image, depth: Depth) -> np.ndarray:
    """Return the values that the file holds, float64 [H, W]. Pillow has no mode for uint32 or int8, but keeps their
    bits."""
    values = np.asarray(image)
    if (depth.kind, depth.bits) == ("unsigned", 32):
        values = values.view(np.uint32)
    elif (depth.kind, depth.bits) == ("signed", 8):
        values = values.view(np.int8)
    if depth.kind == "float" and not np.isfinite(values).all():
        raise BadSample("has values that are not finite")
    return values.astype(np.float64)
