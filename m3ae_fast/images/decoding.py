"""Bytes of an image file -> pixels [C, H, W].

Shapes: C channels (1 grey, 3 RGB, 4 RGBA, else bands), H x W pixels.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.config import Range
from m3ae_fast.images import bands
from m3ae_fast.images.bit_depth import as_pixels, check_colours, deep_grey, depth_of, of_bands, require_range

MAX_PIXELS = 1 << 27  # a larger image is taken for a decompression bomb
# Nothing else is tried: Pillow would hand an EPS file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
# How other files begin that come where images are expected.
_OTHERS = {
    rb"....ftyp(hei|hev|mif1)": "HEIC",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"8BPS": "PSD",
    rb"\x76\x2f\x31\x01": "OpenEXR",
    rb"\s*<(\?xml|svg|!DOCTYPE)": "SVG or HTML",
}
# By format and C: what torchvision's decoder reads, and converts rightly. No PNG: a damaged one is a segmentation fault
# in torchvision 0.29.
_TORCHVISION_MODES = {("JPEG", 1): ("L", "RGB"), ("JPEG", 3): ("L", "RGB"), ("WEBP", 3): ("RGB",)}
_READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TURNING = ("exif", "xmp")  # of `Image.info`: what may say which side is up
_ON_A_SIDE = (5, 6, 7, 8)  # of EXIF's orientations
_SCALES = {"L;2": 85, "L;4": 17}  # by the rawmode of a PNG: levels of 8 bits per level of its own

# Of odd images: they are used or reported, nothing between.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(data: bytes, channels: int, image_range: Range | None = None, dtype: str = "uint8") -> Tensor:
    """Decode an image upright (EXIF) to [C, H, W]; transparent parts become white unless C = 4. An array of bands, a
    .npy or such a TIFF, must have C of them.

    docs/guide/image-formats.md lists the tested formats and depths. Of several frames or pages the first is taken.

    Args:
        image_range: what is black and white where values are not levels from 0 to 255; None: no such image is read.
        dtype: of the result: "uint8" or "uint16", from black, 0, to white, 255 or 65535; "float32", black 0 and white
            1, if values may lie beyond both.

    Raises:
        BadSample: no image, a broken one, one of more than MAX_PIXELS, a bit depth for which no `image_range` is set,
            or a different number of channels.
    """
    if not data:
        raise BadSample("the image is empty")
    if (values := read_bands(data, channels, dtype)) is not None:
        return pixels_of_bands(values, channels, image_range, dtype)
    header = header_of(data)
    # of a WEBP torchvision would ignore which side is up: it turns JPEGs alone
    is_turned = header.format == "WEBP" and not header.info.keys().isdisjoint(_TURNING)
    if header.mode in _TORCHVISION_MODES.get((header.format or "", channels), ()) and not is_turned:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch warns of buffers it may not write to
        try:
            return widened(torchvision_decode(encoded, _READ_MODES[channels], apply_exif_orientation=True), dtype)
        except RuntimeError:
            pass  # Pillow may know better
    try:
        if header.format == "JPEG2000":
            _check_precision(data)
        return pixels_of(header, channels, image_range, dtype)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"the image is broken ({error})") from None


def format_of(data: bytes) -> str:
    """Return the name of the format, such as "JPEG", of a file that `decode_image` has read."""
    if bands.is_npy(data):
        return "NPY"
    return "TIFF" if bands.is_tiff(data) else Image.open(BytesIO(data), formats=_FORMATS).format or "?"


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width as a file's header has them, before EXIF turns it; for most formats, the first few KB of
    the file are sufficient. Raises BadSample if it is no image, a broken or too large one, or more of the file is
    needed."""
    if bands.is_npy(data):
        height, width, *_ = (*bands.npy_header(data)[0], 0, 0)
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise BadSample(f"an array of {height} x {width}, not an image's")
        return height, width
    try:
        header = header_of(data)
    except BadSample:
        if not bands.is_tiff(data):
            raise
        height, width, _ = bands.read_tiff(data).shape
        return height, width
    return header.height, header.width


def upright_size_of(data: bytes) -> tuple[int, int]:
    """Return height and width of an image file as `decode_image` gives it, turned by EXIF. Raises BadSample as
    `size_of`."""
    height, width = size_of(data)
    if not bands.is_npy(data):
        with suppress(BadSample):  # a TIFF that Pillow does not read
            if header_of(data).getexif().get(ExifTags.Base.Orientation) in _ON_A_SIDE:
                return width, height
    return height, width


def read_bands(data: bytes, channels: int, dtype: str) -> np.ndarray | None:
    """Return the values [H, W, bands] of a file that is no picture of C channels to Pillow: a .npy, and a TIFF of which
    Pillow would read not all bands, not all bits, or nothing. None of other files. Raises BadSample if it cannot."""
    if bands.is_npy(data):
        return bands.read_npy(data)
    if not bands.is_tiff(data):
        return None
    try:
        header = header_of(data)
    except BadSample:
        return bands.read_tiff(data)
    count, has_fourth = bands.bands_of(header)
    is_other = count > 4 or channels not in _PIL_MODES or (channels == 4 and has_fourth)
    is_cut = dtype != "uint8" and count > 1 and depth_of(header).is_deep
    return bands.read_tiff(data) if is_other or is_cut else None


def own_bands(data: bytes) -> np.ndarray | None:
    """Return the values [H, W, bands] of a .npy, and of a TIFF with other bands than grey, colours and transparency;
    None of pictures. Raises BadSample if it cannot be read."""
    if bands.is_npy(data):
        return bands.read_npy(data)
    if not bands.is_tiff(data):
        return None
    try:
        count, has_other = bands.bands_of(header_of(data))
    except BadSample:
        return bands.read_tiff(data)
    return bands.read_tiff(data) if count > 4 or has_other else None


def pixels_of_bands(values: np.ndarray, channels: int, image_range: Range | None, dtype: str) -> Tensor:
    """Return values [H, W, bands] as pixels [C, H, W]. Raises BadSample where C are not the bands, or without a range
    for values of more than 8 bits."""
    if values.shape[2] != channels:
        raise BadSample(f"an array {list(values.shape)} has {values.shape[2]} channels, the model takes {channels}")
    pixels = of_bands(values, image_range, dtype)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).copy())


def header_of(data: bytes) -> Image.Image:
    """Return the image, of which Pillow has read the header. Raises BadSample if it is none, or too large."""
    try:
        header = Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Exception:  # Pillow raises anything on hostile input
        found = next((name for sign, name in _OTHERS.items() if re.match(sign, data[:100], re.DOTALL)), None)
        known = f": it looks like {found}" if found else ""
        raise BadSample(f"not an image in a known format{known}") from None
    if header.width * header.height > MAX_PIXELS:
        raise BadSample(f"the image has {header.width} x {header.height} pixels, more than {MAX_PIXELS}")
    return header


def _check_precision(data: bytes) -> None:
    """Raise BadSample if a component of a JPEG 2000 has no levels from 0 to 255: Pillow would shift its values."""
    start = data.index(b"\xff\x4f\xff\x51") + 40  # of the SIZ marker's Csiz, behind the sizes of image and tiles
    precisions = data[start + 2 : start + 2 + 3 * int.from_bytes(data[start : start + 2], "big") : 3]
    if any(precision > 7 for precision in precisions):  # bits - 1, and 128 where signed
        raise BadSample("a JPEG 2000 of more than 8 bits is not read")


def pixels_of(image: Image.Image, channels: int, image_range: Range | None = None, dtype: str = "uint8") -> Tensor:
    """Return a Pillow image, upright, as pixels [C, H, W]. Transparency, depth and errors as in `decode_image`."""
    if channels not in _PIL_MODES:
        raise BadSample(f"has {len(image.getbands())} channels, the model takes {channels}")
    depth, clear = depth_of(image), _transparent_level(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "LAB":
        raise BadSample("colours in CIELAB are not read")
    if depth.is_deep:
        require_range(depth, image_range)
        if len(image.getbands()) == 1:
            grey = deep_grey(image, depth, image_range, channels, dtype)
            return torch.from_numpy(grey).expand(channels, -1, -1)
        check_colours(image, depth, image_range, dtype)
    if clear is not None:
        image.info["transparency"] = clear
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    pixels = torch.from_numpy(np.array(image.convert(_PIL_MODES[channels])))  # [H, W, C] or [H, W]
    return widened(pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1), dtype)


def widened(levels_CHW: Tensor, dtype: str) -> Tensor:
    """Return levels from 0 to 255 as pixels of `dtype`."""
    return levels_CHW if dtype == "uint8" else torch.from_numpy(as_pixels(levels_CHW.numpy() / 255, dtype))


def _transparent_level(image: Image.Image) -> int | None:
    """Return the transparent level of a PNG of 2 or 4 bits, scaled to 8 bits; None for others. Pillow scales the pixels
    only."""
    found = next((_SCALES[str(tile[3])] for tile in getattr(image, "tile", ()) if str(tile[3]) in _SCALES), None)
    clear = image.info.get("transparency")
    return clear * found if found and isinstance(clear, int) else None
