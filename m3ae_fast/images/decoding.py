"""Decoding of image files into pixels [C, H, W].

Shapes: C channels (1: grey, 3: RGB, 4: RGBA, otherwise bands), H x W pixels.
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

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.config import Range
from m3ae_fast.images import bands
from m3ae_fast.images.bit_depth import as_pixels, bands_to_pixels, check_colours, deep_grey, depth_of, require_range

try:
    # simplejpeg decodes a JPEG in 0.6 to 0.7 times the time that Pillow takes, and returns the same pixels
    from simplejpeg import decode_jpeg
except ImportError:  # simplejpeg has no wheel for this Python (such as 3.15) or processor
    decode_jpeg = None

MAX_PIXELS = 1 << 27  # a larger image is rejected as a decompression bomb
# Other formats are rejected: Pillow would pass an EPS file to Ghostscript.
# images/suffixes.py lists the suffixes of image files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
# First bytes of other formats that are often found in place of images, for error messages.
_OTHERS = {
    rb"....ftyp(hei|hev|mif1)": "HEIC",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"8BPS": "PSD",
    rb"\x76\x2f\x31\x01": "OpenEXR",
    rb"\s*<(\?xml|svg|!DOCTYPE)": "SVG or HTML",
}
# colour spaces in which simplejpeg returns JPEGs of the Pillow modes L and RGB, by number of channels
_COLOUR_SPACES = {1: "GRAY", 3: "RGB"}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_UPRIGHT = 1  # EXIF orientation of an image that is neither rotated nor mirrored
_ON_A_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# factors that convert the levels of a 2-bit or 4-bit PNG to 8-bit levels, by Pillow's raw mode
_SCALES = {"L;2": 85, "L;4": 17}

# Pillow warns about unusual images, which are read or reported anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(data: bytes, channels: int, value_range: Range | None = None, dtype: str = "uint8") -> Tensor:
    """Decode an image to [C, H, W], with the EXIF orientation applied. Transparent parts become white unless C = 4. An
    array of bands (a .npy or TIFF file) must have C bands.

    docs/guide/image-formats.md lists the tested formats and bit depths. If there are several frames or pages, the first
    is decoded.

    Args:
        value_range: values of black and white, for images whose values are not levels from 0 to 255; None: such images
            are rejected.
        dtype: dtype of the result: "uint8" or "uint16", with black as 0 and white as 255 or 65535, or "float32", with
            black as 0 and white as 1, which allows values outside this range.

    Raises:
        BadSample: the file is not an image, is damaged, has more than MAX_PIXELS, has a bit depth for which no
            `value_range` is set, or has a different number of channels.
    """
    if not data:
        raise BadSample("the image is empty")
    if (values := read_bands(data, channels, dtype)) is not None:
        return pixels_of_bands(values, channels, value_range, dtype)
    header = header_of(data)
    if (levels := _plain_jpeg(data, header, channels)) is not None:
        return widened(levels, dtype)
    try:
        if header.format == "JPEG2000":
            check_precision(data)
        if header.format == "JPEG" and channels == 1:
            header.draft("L", header.size)  # the brightness that is stored in the file, as simplejpeg returns it
        return pixels_of(header, channels, value_range, dtype)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"the image is damaged ({error})") from None


def _plain_jpeg(data: bytes, header: Image.Image, channels: int) -> Tensor | None:
    """Return the pixels, uint8 [C, H, W], of a JPEG that needs neither a conversion of colours nor a rotation; None if
    Pillow must read the image."""
    is_plain = header.format == "JPEG" and header.mode in ("L", "RGB") and channels in _COLOUR_SPACES
    if decode_jpeg is None or not is_plain or _orientation(header) != _UPRIGHT:
        return None
    try:
        levels = decode_jpeg(data, _COLOUR_SPACES[channels])  # [H, W, C]
    except ValueError:  # the file is damaged, but Pillow may be able to read it
        return None
    return torch.from_numpy(levels).permute(2, 0, 1)


def _orientation(header: Image.Image) -> int:
    """Return the EXIF orientation of an image, which is 1 (upright) if its metadata contain none or are damaged."""
    try:
        return header.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # Pillow raises many kinds of errors on damaged metadata
        return _UPRIGHT


def format_of(data: bytes) -> str:
    """Return the name of the format, such as "JPEG", of a file that `decode_image` has read."""
    if bands.is_npy(data):
        return "NPY"
    return "TIFF" if bands.is_tiff(data) else Image.open(BytesIO(data), formats=_FORMATS).format or "?"


def size_of(data: bytes) -> tuple[int, int]:
    """Return the height and width in a file's header, before the EXIF orientation is applied. For most formats, the
    first few KB of the file are sufficient. Raises BadSample if the file is not an image, is damaged or too large, or
    if more of the file is needed."""
    if bands.is_npy(data):
        height, width, *_ = (*bands.npy_header(data)[0], 0, 0)
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise BadSample(f"the array has {height} x {width} pixels, which is not a valid image size")
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
    """Return the height and width of an image file after the EXIF orientation is applied, as in `decode_image`. Raises
    BadSample as `size_of` does."""
    height, width = size_of(data)
    if not bands.is_npy(data):
        with suppress(BadSample):  # Pillow does not read some TIFFs
            if _orientation(header_of(data)) in _ON_A_SIDE:
                return width, height
    return height, width


def read_bands(data: bytes, channels: int, dtype: str) -> np.ndarray | None:
    """Return the values [H, W, bands] of a file that Pillow cannot read as an image of C channels: a .npy file, or a
    TIFF of which Pillow would not read all bands or all bits. Return None for other files. Raises BadSample if the file
    cannot be read."""
    if bands.is_npy(data):
        return bands.read_npy(data)
    if not bands.is_tiff(data):
        return None
    try:
        header = header_of(data)
    except BadSample:
        return bands.read_tiff(data)
    count, has_fourth = bands.bands_of(header)
    is_other = count > 4 or channels not in PIL_MODES or (channels == 4 and has_fourth)
    is_cut = dtype != "uint8" and count > 1 and depth_of(header).is_deep
    return bands.read_tiff(data) if is_other or is_cut else None


def own_bands(data: bytes) -> np.ndarray | None:
    """Return the values [H, W, bands] of a .npy file, or of a TIFF with bands other than grey, colours and
    transparency; None for ordinary images. Raises BadSample if the file cannot be read."""
    if bands.is_npy(data):
        return bands.read_npy(data)
    if not bands.is_tiff(data):
        return None
    try:
        count, has_other = bands.bands_of(header_of(data))
    except BadSample:
        return bands.read_tiff(data)
    return bands.read_tiff(data) if count > 4 or has_other else None


def pixels_of_bands(values: np.ndarray, channels: int, value_range: Range | None, dtype: str) -> Tensor:
    """Return values [H, W, bands] as pixels [C, H, W]. Raises BadSample if the number of bands is not C, or if values
    with more than 8 bits have no range."""
    if values.shape[2] != channels:
        raise BadSample(
            f"the array {list(values.shape)} has {values.shape[2]} channels, but the model expects {channels}"
        )
    pixels = bands_to_pixels(values, value_range, dtype)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).copy())


def header_of(data: bytes) -> Image.Image:
    """Return a Pillow image of which only the header has been read. Raises BadSample if it is not an image or is too
    large."""
    try:
        header = Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Exception:  # Pillow raises many kinds of errors on hostile input
        found = next((name for sign, name in _OTHERS.items() if re.match(sign, data[:100], re.DOTALL)), None)
        known = f": it looks like {found}" if found else ""
        raise BadSample(f"the file is not an image in a known format{known}") from None
    if header.width * header.height > MAX_PIXELS:
        raise BadSample(f"the image has {header.width} x {header.height} pixels, but at most {MAX_PIXELS} are allowed")
    return header


def check_precision(data: bytes) -> None:
    """Raise BadSample if a component of a JPEG 2000 has more than 8 bits or signed values, because Pillow would shift
    its values."""
    start = data.index(b"\xff\x4f\xff\x51") + 40  # Csiz in the SIZ marker, after the sizes of image and tiles
    precisions = data[start + 2 : start + 2 + 3 * int.from_bytes(data[start : start + 2], "big") : 3]
    # the byte of a component is its number of bits minus 1, plus 128 if its values are signed
    if any(precision > 7 for precision in precisions):
        raise BadSample("the image is a JPEG 2000 with more than 8 bits, which is not supported")


def pixels_of(image: Image.Image, channels: int, value_range: Range | None = None, dtype: str = "uint8") -> Tensor:
    """Return a Pillow image as pixels [C, H, W], with its orientation applied. Transparency, bit depth and errors are
    handled as in `decode_image`."""
    if channels not in PIL_MODES:
        raise BadSample(f"the image has {len(image.getbands())} channels, but the model expects {channels}")
    depth, clear = depth_of(image), _transparent_level(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "LAB":
        raise BadSample("the image has CIELAB colours, which are not supported")
    if depth.is_deep:
        require_range(depth, value_range)
        if len(image.getbands()) == 1:
            grey = deep_grey(image, depth, value_range, channels, dtype)
            return torch.from_numpy(grey).expand(channels, -1, -1)
        check_colours(image, depth, value_range, dtype)
    if clear is not None:
        image.info["transparency"] = clear
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    pixels = torch.from_numpy(np.array(image.convert(PIL_MODES[channels])))  # [H, W, C] or [H, W]
    return widened(pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1), dtype)


def widened(levels_CHW: Tensor, dtype: str) -> Tensor:
    """Return levels from 0 to 255, uint8 [C, H, W], as pixels of `dtype`."""
    return levels_CHW if dtype == "uint8" else torch.from_numpy(as_pixels(levels_CHW.numpy() / 255, dtype))


def _transparent_level(image: Image.Image) -> int | None:
    """Return the transparent level of a 2-bit or 4-bit PNG, scaled to 8 bits; None for other images. Pillow scales the
    pixels, but not this level."""
    found = next((_SCALES[str(tile[3])] for tile in getattr(image, "tile", ()) if str(tile[3]) in _SCALES), None)
    clear = image.info.get("transparency")
    return clear * found if found and isinstance(clear, int) else None
