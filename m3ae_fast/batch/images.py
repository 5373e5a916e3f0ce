"""Bytes of an image file -> uint8 [C, H, W].

Shapes: C channels (1 grey, 3 RGB, 4 RGBA), H x W pixels.
"""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from m3ae_fast.batch.bad_samples import BadSample

MAX_PIXELS = 1 << 27  # a larger image is taken for a decompression bomb
# Nothing else is tried: Pillow would hand an EPS file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# By format and C: what torchvision's decoder reads, and converts rightly. No PNG: a damaged one is a segmentation fault
# in torchvision 0.29.
_TORCHVISION_MODES = {
    ("JPEG", 1): ("L", "RGB"),
    ("JPEG", 3): ("L", "RGB"),
    ("WEBP", 3): ("RGB",),
}
_READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd images: they are used or reported, nothing between


def decode_image(data: bytes, channels: int) -> Tensor:
    """Decode an image upright (EXIF) to uint8 [C, H, W]; transparent parts become white unless C = 4.

    Raises:
        BadSample: no image, a broken one, or one of more than MAX_PIXELS.
    """
    if not data:
        raise BadSample("the image is empty")
    try:
        header = Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Exception:  # Pillow raises anything on hostile input
        raise BadSample("not an image in a known format") from None
    if header.width * header.height > MAX_PIXELS:
        raise BadSample(f"the image has {header.width} x {header.height} pixels, more than {MAX_PIXELS}")
    modes = _TORCHVISION_MODES.get((header.format or "", channels), ())
    if header.mode in modes and "transparency" not in header.info:
        try:
            return _decode_with_torchvision(data, channels)
        except RuntimeError:
            pass  # Pillow may know better
    try:
        return pixels_of(header, channels)
    except Exception as error:
        raise BadSample(f"the image is broken ({error})") from None


def _decode_with_torchvision(data: bytes, channels: int) -> Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch warns of buffers it may not write to
    return torchvision_decode(encoded, _READ_MODES[channels], apply_exif_orientation=True)


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """uint8 [C, H, W] of a Pillow image, upright; transparent parts become white unless C = 4."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    pixels = torch.from_numpy(np.array(image.convert(_PIL_MODES[channels])))  # [H, W, C] or [H, W]
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
