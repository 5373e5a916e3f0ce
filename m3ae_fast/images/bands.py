"""Reads arrays of bands from .npy and TIFF files.

Shapes: H x W pixels, C channels.
"""

from __future__ import annotations

import logging
import re
from io import BytesIO

import numpy as np
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library

NPY = b"\x93NUMPY"
MAX_VALUES = 1 << 28  # maximum number of values in an array; a larger array is rejected as a decompression bomb
DTYPES = (np.uint8, np.uint16, np.float32)
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_PLAIN = (1, 2)  # values of TIFF's PhotometricInterpretation: grey with black as 0, and RGB
_SAMPLES, _ORIENTATION, _EXTRA = 277, 274, 338  # tags of TIFF

# tifffile logs messages on unusual files, which are read or reported anyway
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class ReaderMissing(BadSample):
    """Raised for a TIFF that only tifffile can read if tifffile is not installed."""


def is_npy(data: bytes) -> bool:
    """Return whether a file is a .npy file, given its first bytes."""
    return data.startswith(NPY)


def is_tiff(data: bytes) -> bool:
    """Return whether a file is a TIFF, given its first bytes."""
    return _TIFF.match(data) is not None


def bands_of(header: Image.Image) -> tuple[int, bool]:
    """Return the number of samples per pixel of a TIFF, and whether there is one extra sample that is not an alpha
    channel. Pillow silently drops such a sample."""
    tags = getattr(header, "tag_v2", {})
    return int(tags.get(_SAMPLES, 1)), tags.get(_EXTRA) == (0,)


def npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return the shape of the array in a .npy file, whether it is in Fortran order, its dtype, and the offset of its
    values. The beginning of the file is sufficient. Raises BadSample if it is damaged."""
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        return tuple(map(int, shape)), is_fortran, dtype, file.tell()  # NumPy accepts True as a length
    except Exception as error:  # NumPy's parser raises many kinds of errors for foreign headers
        raise BadSample(f"the array is damaged ({' '.join(str(error).split())[:200]})") from None


def read_npy(data: bytes) -> np.ndarray:
    """Return the array in a .npy file as [H, W, C], with a dtype of `DTYPES`; [H, W] becomes C = 1. Raises BadSample as
    `npy_header` and `checked` do."""
    shape, is_fortran, dtype, start = npy_header(data)
    try:
        values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    except ValueError as error:
        raise BadSample(f"the array is damaged ({error})") from None
    return checked(values.astype(values.dtype.newbyteorder("="), copy=False))


def read_tiff(data: bytes) -> np.ndarray:
    """Return the first page of a TIFF with any number of bands, [H, W, C] with a dtype of `DTYPES`. Raises BadSample as
    `checked` does, and if tifffile is missing, the file cannot be read, the image is rotated, its values are neither
    grey nor RGB, or its axes are not rows, columns and bands."""
    try:
        tifffile = library("tifffile", "a TIFF with bands or a bit depth that Pillow cannot read")
    except UserError as error:
        raise ReaderMissing(str(error)) from None
    try:
        with tifffile.TiffFile(BytesIO(data)) as file:
            page = file.pages.first
            if page.size > MAX_VALUES:
                raise BadSample(f"the image has {page.size} values, but at most {MAX_VALUES} are allowed")
            tag = page.tags.get(_ORIENTATION)
            if page.photometric not in _PLAIN or (tag is not None and tag.value != 1):
                raise BadSample(
                    "the image is a TIFF with bands that is rotated, or whose values are neither grey nor RGB"
                )
            values, axes = page.asarray(), page.axes
            if axes == "SYX":  # separate planes
                values, axes = np.moveaxis(values, 0, 2), "YXS"
    except BadSample:
        raise
    except Exception as error:  # hostile files raise many kinds of errors
        raise BadSample(f"the TIFF is damaged ({' '.join(str(error).split())[:200]})") from None
    if axes not in ("YX", "YXS"):
        raise BadSample(f"the TIFF has the axes {axes}, but must have rows, columns and bands")
    return checked(values)


def checked(values: np.ndarray) -> np.ndarray:
    """Return an image's values as [H, W, C]. Raises BadSample if the shape does not fit, the dtype is not in `DTYPES`,
    a value is not finite, or there are more than MAX_VALUES."""
    shape = list(values.shape)
    if values.dtype not in DTYPES:
        raise BadSample(f"the array has dtype {values.dtype}, but must be uint8, uint16 or float32")
    if len(shape) not in (2, 3) or not values.size:
        raise BadSample(f"the array has shape {shape}, but must have [height, width, channels]")
    if values.size > MAX_VALUES:
        raise BadSample(f"the array has shape {shape}, which is more than {MAX_VALUES} values")
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise BadSample("the image has values that are not finite")
    return values[..., None] if len(shape) == 2 else values


def write_npy(values: np.ndarray) -> bytes:
    """Return the bytes of a .npy file with an array, which `read_npy` reads if it is [H, W] or [H, W, C] with a dtype
    of `DTYPES`."""
    out = BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
