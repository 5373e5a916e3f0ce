"""Detection of an image file's kind: its number of channels and its value range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.images.bit_depth import Depth, depth_of, grey_values
from m3ae_fast.images.decoding import decode_image, header_of, own_bands

_LIKE_GREY = 1  # maximum difference in levels between red, green and blue of a grey image


class Kind(NamedTuple):
    """Channels and values of an image file."""

    # Number of channels with which a model reads the image without loss; 1 for a grey image, even if it is stored as
    # equal red, green and blue.
    channels: int
    is_array: bool  # whether the file is an array of bands, which are not converted to other channels
    dtype: str  # dtype of an array; "uint8" for ordinary images
    height: int
    width: int
    depth: Depth | None = None  # the bit depth if it is high; None for levels from 0 to 255
    low: float = 0.0  # lowest value
    high: float = 255.0  # highest value


def kind_of(data: bytes) -> Kind:
    """Return the kind of an image file. Transparency is ignored, because it becomes white. Raises BadSample as
    `decode_image` does, except for a missing range."""
    values = own_bands(data)
    if values is not None:
        depth = Depth("float", 32) if values.dtype == np.float32 else Depth("unsigned", 8 * values.itemsize)
        height, width, channels = values.shape
        return Kind(channels, True, str(values.dtype), height, width, *_spread(depth, values))
    header = header_of(data)
    depth = depth_of(header)
    if not depth.is_deep:
        pixels = decode_image(data, 3).short()
        is_grey = int((pixels - pixels.roll(1, 0)).abs().max()) <= _LIKE_GREY
        return Kind(1 if is_grey else 3, False, "uint8", *pixels.shape[1:])
    channels = 1 if len(header.getbands()) == 1 else 3
    return Kind(channels, False, "uint8", header.height, header.width, *_spread(depth, _deep(header, depth)))


def channels_and_dtype(kinds: Sequence[Kind]) -> tuple[int, str]:
    """Return `model.channels` and `model.image_dtype` for images of these kinds. If there are grey and colour images,
    the model has colour channels. If most images are arrays of bands, the settings are those of the most frequent kind
    of array, because arrays are not converted."""
    arrays = Counter((kind.channels, kind.dtype) for kind in kinds if kind.is_array)
    if 2 * arrays.total() > len(kinds):
        channels, dtype = arrays.most_common(1)[0][0]
    else:
        channels, dtype = (3 if any(kind.channels == 3 for kind in kinds) or not kinds else 1), "uint8"
    return channels, dtype


def _deep(header: Image.Image, depth: Depth) -> np.ndarray | None:
    """Return the values of a high-bit-depth image with one channel; None for colours, of which Pillow keeps 8 bits.
    Raises BadSample if the image is damaged."""
    if len(header.getbands()) > 1:
        return None
    try:
        return grey_values(header, depth)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds of errors on hostile input
        raise BadSample(f"the image is damaged ({error})") from None


def _spread(depth: Depth, values: np.ndarray | None) -> tuple[Depth | None, float, float]:
    """Return the bit depth (None for levels from 0 to 255), and the lowest and the highest value."""
    low, high = depth.limits if values is None else (float(values.min()), float(values.max()))
    return depth if depth.is_deep else None, low, high
