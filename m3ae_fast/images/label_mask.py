"""Label masks: single-channel PNG files with the class id of each pixel of an image.

Shapes: H x W pixels of the file, S x S pixels of the model's input.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.images.decoding import MAX_PIXELS, upright_size_of

_MODES = ("1", "L", "P", "I;16", "I")  # in palette images, the palette indices are the ids, as in Pascal VOC
MAX_ID = 255


def read_mask(data: bytes, image: bytes) -> Tensor:
    """Return the class ids of a label mask, uint8 [H, W].

    Args:
        data: content of the mask's file.
        image: content of the image's file.

    Raises:
        BadSample: the file is not a label mask, is damaged, or contains an id above 255, or its size differs from that
            of the image after the EXIF orientation is applied.
    """
    mask = _header(data)
    if (mask.height, mask.width) != (size := upright_size_of(image)):
        raise BadSample(f"the mask has {mask.width} x {mask.height} pixels, but the image has {size[1]} x {size[0]}")
    try:
        ids_HW = np.array(mask)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample(f"the mask cannot be decoded ({error})") from None
    if ids_HW.size and (ids_HW.max() > MAX_ID or ids_HW.min() < 0):
        raise BadSample(
            f"the mask has the class id {max(ids_HW.max(), ids_HW.min(), key=abs)}; ids must be from 0 to {MAX_ID}"
        )
    return torch.from_numpy(ids_HW.astype(np.uint8))


def mask_view(ids_HW: Tensor, size: int) -> Tensor:
    """Return the central square of a label mask, scaled to the model's input size, uint8 [S, S]. It corresponds to the
    result of `crops.centre_crop` for the image; each pixel has the class id at its centre."""
    height, width = ids_HW.shape
    side = min(height, width)
    index_S = ((torch.arange(size) + 0.5) * side / size).long()
    return ids_HW[index_S[:, None] + (height - side) // 2, index_S + (width - side) // 2]


def _header(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=("PNG",))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample(f"the mask is not a PNG ({error})") from None
    if image.mode not in _MODES:
        raise BadSample(f"the mask has mode {image.mode}; it must have one channel of class ids")
    if image.height * image.width > MAX_PIXELS:
        raise BadSample(f"the mask has {image.width} x {image.height} pixels, which is more than {MAX_PIXELS:,}")
    return image
