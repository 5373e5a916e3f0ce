"""Images as shards keep them: JPEG, or the array of their bands, no larger than training needs."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.batch.bands import write_npy
from m3ae_fast.batch.crops import resize
from m3ae_fast.batch.images import decode_image, read_bands
from m3ae_fast.config import Range

_MAX_SIDE = 65_500  # pixels that libjpeg writes


def as_member(data: bytes, short_side: int, quality: int, image_range: Range | None = None) -> tuple[str, bytes]:
    """Return suffix and bytes of a shard's member: what `shrink` gives, or of an array of bands (a .npy, or a TIFF that
    is no picture) a .npy with the same dtype, whose short side is at most `short_side` too.

    Raises:
        BadSample: as `shrink`.
    """
    values = read_bands(data, 3, "uint8")
    if values is None:
        return "jpg", shrink(data, short_side, quality, image_range)
    height, width, _ = values.shape
    scale = short_side / min(height, width)
    if scale < 1:
        image = torch.from_numpy(values.transpose(2, 0, 1).copy())
        values = resize(image, max(1, round(height * scale)), max(1, round(width * scale))).permute(1, 2, 0).numpy()
    return "npy", write_npy(np.ascontiguousarray(values))


def shrink(data: bytes, short_side: int, quality: int, image_range: Range | None = None) -> bytes:
    """Return an image file as an RGB JPEG whose short side is at most `short_side` pixels, upright, white where
    transparent.

    A JPEG that is small enough is returned as it is. `image_range` is that of `decode_image`.

    Raises:
        BadSample: it is no image, a broken one, or longer than a JPEG can be.
    """
    image = decode_image(data, 3, image_range)
    height, width = image.shape[-2:]
    scale = short_side / min(height, width)
    if scale >= 1:
        header = Image.open(BytesIO(data))
        if header.format == "JPEG" and header.mode in ("L", "RGB"):
            return data
    else:
        image = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    if max(image.shape[-2:]) > _MAX_SIDE:
        raise BadSample(f"an image of {width} x {height} pixels is too long for a JPEG")
    out = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=quality)
    return out.getvalue()
