"""Conversion of images for shards: to JPEG or an array of bands, no larger than training requires."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.config import Range
from m3ae_fast.images.bands import write_npy
from m3ae_fast.images.bit_depth import depth_of
from m3ae_fast.images.crops import resize
from m3ae_fast.images.decoding import decode_image, header_of, own_bands

_MAX_SIDE = 65_500  # largest side that libjpeg can write


def as_member(data: bytes, short_side: int, quality: int, value_range: Range | None = None) -> tuple[str, bytes]:
    """Return the suffix and the bytes of the member for an image file. The member is the JPEG that `shrink` returns or,
    for an array of bands (see `own_bands`), a .npy of the same dtype, whose short side is also at most `short_side`
    pixels. Raises BadSample as `shrink` does."""
    values = own_bands(data)
    if values is None:
        return "jpg", shrink(data, short_side, quality, value_range)
    small = _reduced(torch.from_numpy(values.transpose(2, 0, 1).copy()), short_side)
    return "npy", write_npy(np.ascontiguousarray(small.permute(1, 2, 0).numpy()))


def is_deep(data: bytes) -> bool:
    """Return whether `shrink` would reduce an image file to 8 bits per channel, because it has more."""
    return depth_of(header_of(data)).is_deep


def shrink(data: bytes, short_side: int, quality: int, value_range: Range | None = None) -> bytes:
    """Return an image file as an RGB JPEG whose short side is at most `short_side` pixels, with the EXIF orientation
    applied and transparent pixels replaced with white. A grey or RGB JPEG that is small enough is returned unchanged.
    `quality`: JPEG quality, 1 to 100; `value_range`: values of black and white, as in `decode_image`. Raises BadSample
    as `decode_image` does, or if the image is too long for a JPEG."""
    image = decode_image(data, 3, value_range)
    small = _reduced(image, short_side)
    if small is image:
        header = Image.open(BytesIO(data))
        if header.format == "JPEG" and header.mode in ("L", "RGB"):
            return data
    if max(small.shape[-2:]) > _MAX_SIDE:
        raise BadSample(f"the image has {image.shape[-1]} x {image.shape[-2]} pixels, which is too long for a JPEG")
    return jpeg(small, quality)


def jpeg(image: Tensor, quality: int) -> bytes:
    """Return an image, uint8 [3, H, W], as the bytes of a JPEG file."""
    out = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _reduced(image: Tensor, short_side: int) -> Tensor:
    """Return the image [C, H, W], reduced to a short side of at most `short_side` pixels."""
    height, width = image.shape[-2:]
    scale = short_side / min(height, width)
    return image if scale >= 1 else resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
