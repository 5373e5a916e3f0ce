"""Images of all formats and bit depths with their expected pixels, from which the table in docs/guide/image-formats.md
is generated.

Shapes: H x W pixels; arrays are [H, W] or [H, W, C].
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tifffile
from PIL import Image

SIDE = 32
_random = np.random.RandomState(0)
# squares of 16 x 16 equal pixels, which JPEG compression preserves
RGB = _random.randint(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
RGB = np.concatenate((RGB, RGB[:16, ::-1]))  # [48, 32, 3]: not square, so that rotations are detected
GREY = RGB[..., 0]
RAMP = np.linspace(0, 1, GREY.size).reshape(GREY.shape)  # from 0 to 1
ALPHA = np.where(RAMP < 0.5, 0, 255).astype(np.uint8)
RGBA = np.dstack((RGB, ALPHA))
ON_WHITE = np.where(ALPHA[..., None] == 0, 255, RGB).astype(np.uint8)
TURN = 6  # EXIF orientation: the image must be rotated clockwise
NEEDS_RANGE = "has .*: set model.value_range"


@dataclass(frozen=True)
class Case:
    """A file of some format with the expected result of decoding."""

    fmt: str
    stored: str  # description of the file
    make: Callable[[], bytes]
    pixels: np.ndarray | None = None  # expected pixels with three channels, and with `value_range` if one is required
    range: object = None
    refused: str | None = None  # part of the error message if the file is rejected regardless of the range
    note: str = ""  # description of the result for the guide

    @property
    def row(self) -> str:
        if self.refused:
            result = f"refused: “{self.refused}”"
        else:
            result = ("with `model.value_range`" if self.range else "yes") + (f"; {self.note}" if self.note else "")
        return f"| {self.fmt} | {self.stored} | {result} |"


def pillow(image: np.ndarray | Image.Image, fmt: str, **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, fmt, **options)
    return out.getvalue()


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = TURN
    return found


def tiff(values: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, metadata=None, **{"photometric": "minisblack", **options})
    return out.getvalue()


def png(values: np.ndarray, bits: int, colour: int, *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """Return a PNG without filters. `values`: [H, W] or [H, W, C], below 2 ** bits; `colour`: PNG's colour type."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8)
    elif bits == 8:
        packed = rows.astype(np.uint8)
    else:
        all_bits = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(all_bits.reshape(height, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def bmp16() -> bytes:
    """Return a BMP with 5 bits per colour and rows from bottom to top."""
    five = (RGB >> 3).astype(np.uint16)
    words = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2])[::-1].astype("<u2").tobytes()
    height, width = GREY.shape
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(words), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(words), 0, 0, 54) + info + words


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the 8-bit levels for a value range."""
    return np.rint(255 * np.clip((values.astype(np.float64) - low) / (high - low), 0, 1))


def cmyk_pixels(data: bytes) -> np.ndarray:
    """Return the RGB pixels for the inks of a CMYK image."""
    inks = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64) / 255
    return np.rint(255 * (1 - inks[..., :3]) * (1 - inks[..., 3:]))


def _bits(bits: int) -> np.ndarray:
    return np.floor(RAMP * ((1 << bits) - 1) + 0.5).astype(np.int64)


def _jpeg(array: np.ndarray | Image.Image, **options) -> tuple[Callable[[], bytes], np.ndarray]:
    """Return a function that encodes a JPEG, and the pixels of this JPEG as decoded by Pillow. For most JPEGs, the
    project uses another decoder."""
    data = pillow(array, "JPEG", quality=95, **options)
    return (lambda: data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


CMYK = Image.fromarray(RGB).convert("CMYK")
_PLAIN_CMYK = pillow(CMYK, "JPEG", quality=100)  # Pillow writes Adobe's marker and inverts the values
# the same file without the marker, so that decoders do not invert the values
_MARKER = _PLAIN_CMYK.index(b"\xff\xee")
_LENGTH = int.from_bytes(_PLAIN_CMYK[_MARKER + 2 : _MARKER + 4], "big")
_WITHOUT = _PLAIN_CMYK[:_MARKER] + _PLAIN_CMYK[_MARKER + 2 + _LENGTH :]

_rotated = np.rot90(RGB, -1)
_palette = RGB[::16, ::16].reshape(-1, 3)
_indices = np.arange(len(_palette)).reshape(RGB.shape[0] // 16, -1).repeat(16, 0).repeat(16, 1)
_plte = (b"PLTE", _palette.tobytes())
_deep = _bits(16).astype(np.uint16)
_shifts = np.array([0, 7, 99])
_deep_rgb = ((_deep[..., None].astype(np.int64) + 1000 * _shifts) % 65536).astype(np.uint16)
_float = (RAMP * 3 - 1).astype(np.float32)
_ints = (RAMP * 2e9 - 1e9).astype(np.int32)
_uints = (RAMP * (2**32 - 1)).astype(np.uint32)
_five = np.dstack((RGB, RGB[..., :2]))
_two = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
_gif = Image.fromarray(_indices.astype(np.uint8), "P")
_gif.putpalette(_palette.tobytes())
_FIRST = "the first frame"

CASES = [
    Case("JPEG", "colour", *_jpeg(RGB)),
    Case("JPEG", "grey", *_jpeg(GREY)),
    Case("JPEG", "progressive", *_jpeg(RGB, progressive=True)),
    Case("JPEG", "colour, rotated by EXIF", _jpeg(RGB, exif=exif())[0], np.rot90(_jpeg(RGB)[1], -1)),
    Case("JPEG", "CMYK, inverted as Adobe does", lambda: _PLAIN_CMYK, cmyk_pixels(_PLAIN_CMYK)),
    Case("JPEG", "CMYK", lambda: _WITHOUT, cmyk_pixels(_WITHOUT)),
    Case("PNG", "grey, 1 bit", lambda: png(_bits(1), 1, 0), _bits(1) * 255),
    Case("PNG", "grey, 2 bits", lambda: png(_bits(2), 2, 0), _bits(2) * 85),
    Case("PNG", "grey, 4 bits", lambda: png(_bits(4), 4, 0), _bits(4) * 17),
    Case("PNG", "grey, 8 bits", lambda: png(GREY, 8, 0), GREY),
    Case(
        "PNG",
        "grey, 2 bits, one level transparent",
        lambda: png(_bits(2), 2, 0, (b"tRNS", b"\0\1")),
        np.where(_bits(2) == 1, 255, _bits(2) * 85),
        note="white where transparent",
    ),
    Case(
        "PNG",
        "grey, 4 bits, one level transparent",
        lambda: png(_bits(4), 4, 0, (b"tRNS", b"\0\3")),
        np.where(_bits(4) == 3, 255, _bits(4) * 17),
        note="white where transparent",
    ),
    Case("PNG", "grey, 16 bits", lambda: png(_deep, 16, 0), scaled(_deep, 0, 65535), "dtype"),
    Case("PNG", "grey, 16 bits, 12 used", lambda: png(_deep >> 4, 16, 0), scaled(_deep >> 4, 0, 4095), (0, 4095)),
    Case(
        "PNG",
        "grey, 16 bits, one value transparent",
        lambda: png(_deep, 16, 0, (b"tRNS", struct.pack(">H", _deep[3, 3]))),
        np.where(_deep == _deep[3, 3], 255, scaled(_deep, 0, 65535)),
        "dtype",
        note="white where transparent",
    ),
    Case("PNG", "colour, 8 bits", lambda: png(RGB, 8, 2), RGB),
    Case("PNG", "colour, interlaced", lambda: tiny_interlaced(), RGB[:1, :1]),
    Case("PNG", "colour, rotated by EXIF", lambda: pillow(RGB, "PNG", exif=exif()), _rotated),
    Case(
        "PNG",
        "colour, one transparent colour",
        lambda: png(RGB, 8, 2, (b"tRNS", struct.pack(">3H", *RGB[0, 0]))),
        np.where((RGB[0, 0] == RGB).all(-1)[..., None], 255, RGB),
        note="white where transparent",
    ),
    Case(
        "PNG",
        "colour, 16 bits",
        lambda: png(_deep_rgb, 16, 2),
        scaled(_deep_rgb, 0, 65535),
        "dtype",
        note='`"dtype"` alone',
    ),
    Case(
        "PNG",
        "colour, 16 bits, one transparent colour",
        lambda: png(_deep_rgb, 16, 2, (b"tRNS", struct.pack(">3H", *_deep_rgb[0, 0]))),
        range="dtype",
        refused="a transparent colour, which is not supported",
    ),
    Case("PNG", "palette", lambda: png(_indices, 4, 3, _plte), RGB),
    Case(
        "PNG",
        "palette with transparency",
        lambda: png(_indices, 8, 3, _plte, (b"tRNS", b"\xff\0")),
        np.where((_indices == 1)[..., None], 255, RGB),
        note="white where transparent",
    ),
    Case("PNG", "colour with alpha", lambda: png(RGBA, 8, 6), ON_WHITE, note="white where transparent"),
    Case(
        "PNG",
        "grey with alpha",
        lambda: png(np.dstack((GREY, ALPHA)), 8, 4),
        np.where(ALPHA == 0, 255, GREY),
        note="white where transparent",
    ),
    Case("PNG", "animated", lambda: pillow(_two[0], "PNG", save_all=True, append_images=_two[1:]), RGB, note=_FIRST),
    Case("TIFF", "colour, 8 bits", lambda: tiff(RGB, photometric="rgb"), RGB),
    Case("TIFF", "colour, separate planes", lambda: tiff(RGB.transpose(2, 0, 1), photometric="rgb"), RGB),
    Case("TIFF", "grey, 8 bits", lambda: tiff(GREY), GREY),
    Case("TIFF", "grey, 8 bits, 0 is white", lambda: tiff(GREY, photometric="miniswhite"), 255 - GREY),
    Case("TIFF", "1 bit", lambda: pillow(Image.fromarray(_bits(1) == 1), "TIFF", compression="group4"), _bits(1) * 255),
    Case("TIFF", "palette", lambda: pillow(_gif, "TIFF"), RGB),
    Case("TIFF", "colour, in tiles", lambda: tiff(RGB, photometric="rgb", tile=(16, 16)), RGB),
    Case("TIFF", "colour, LZW", lambda: pillow(RGB, "TIFF", compression="tiff_lzw"), RGB),
    Case("TIFF", "colour, deflate", lambda: pillow(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB),
    Case("TIFF", "colour, PackBits", lambda: pillow(RGB, "TIFF", compression="packbits"), RGB),
    Case("TIFF", "colour with alpha", lambda: pillow(RGBA, "TIFF"), ON_WHITE, note="white where transparent"),
    Case("TIFF", "CMYK", lambda: pillow(CMYK, "TIFF"), RGB),
    Case("TIFF", "colour, rotated", lambda: pillow(RGB, "TIFF", exif=exif()), _rotated),
    Case("TIFF", "several pages", lambda: tiff(np.stack((GREY, 255 - GREY))), GREY, note="the first page"),
    Case("TIFF", "grey, uint16", lambda: tiff(_deep), scaled(_deep, 0, 65535), "dtype"),
    Case("TIFF", "grey, uint16, big-endian", lambda: tiff(_deep, byteorder=">"), scaled(_deep, 0, 65535), "dtype"),
    Case(
        "TIFF",
        "grey, uint16, smallest value 70",
        lambda: tiff(_deep // 64 + 70),
        scaled(_deep // 64, 0, 400),
        (70, 470),
    ),
    Case(
        "TIFF",
        "grey, uint16, 0 is white",
        lambda: tiff(_deep, photometric="miniswhite"),
        255 - scaled(_deep, 0, 65535),
        "dtype",
    ),
    Case(
        "TIFF",
        "grey, uint16, deflate",
        lambda: pillow(_deep, "TIFF", compression="tiff_adobe_deflate"),
        scaled(_deep, 0, 65535),
        "dtype",
    ),
    Case("TIFF", "grey, int16", lambda: tiff((_deep - 32768.0).astype(np.int16)), scaled(_deep, 0, 65535), "dtype"),
    Case("TIFF", "grey, int8", lambda: tiff((GREY - 128.0).astype(np.int8)), GREY, "dtype"),
    Case("TIFF", "grey, uint32", lambda: tiff(_uints), scaled(_uints, 0, 2**32 - 1), "dtype"),
    Case("TIFF", "grey, int32", lambda: tiff(_ints), scaled(_ints, -1e9, 1e9), (-1e9, 1e9)),
    Case("TIFF", "grey, float32", lambda: tiff(_float), scaled(_float, -1, 2), (-1, 2)),
    Case("TIFF", "grey, float32, from 0 to 1", lambda: tiff(RAMP.astype(np.float32)), scaled(RAMP, 0, 1), "dtype"),
    Case(
        "TIFF",
        "grey, float32, 0 is white",
        lambda: tiff(RAMP.astype(np.float32), photometric="miniswhite"),
        255 - scaled(RAMP, 0, 1),
        "dtype",
    ),
    Case(
        "TIFF",
        "grey, float32, values that are not finite",
        lambda: tiff(np.where(RAMP < 0.5, np.nan, RAMP).astype(np.float32)),
        range="dtype",
        refused="has values that are not finite",
    ),
    Case(
        "TIFF",
        "colour, uint16",
        lambda: tiff(_deep_rgb, photometric="rgb"),
        scaled(_deep_rgb, 0, 65535),
        "dtype",
        note='`"dtype"` alone',
    ),
    Case("TIFF", "grey, float64", lambda: tiff(RAMP), range="dtype", refused="the array has dtype float64"),
    Case("TIFF", "5 bands", lambda: tiff(_five, planarconfig="contig"), refused="has 5 channels"),
    Case("TIFF", "CIELAB", lambda: tiff(RGB, photometric="cielab"), refused="CIELAB colours, which are not supported"),
    Case("WebP", "colour", lambda: pillow(RGB, "WEBP", lossless=True), RGB),
    Case("WebP", "colour, rotated by EXIF", lambda: pillow(RGB, "WEBP", lossless=True, exif=exif()), _rotated),
    Case(
        "WebP",
        "colour with alpha",
        lambda: pillow(RGBA, "WEBP", lossless=True, exact=True),
        ON_WHITE,
        note="white where transparent",
    ),
    Case(
        "WebP",
        "animated",
        lambda: pillow(_two[0], "WEBP", save_all=True, append_images=_two[1:], lossless=True),
        RGB,
        note=_FIRST,
    ),
    Case("GIF", "palette", lambda: pillow(_gif, "GIF"), RGB),
    Case(
        "GIF",
        "palette, one colour transparent",
        lambda: pillow(_gif, "GIF", transparency=1),
        np.where((_indices == 1)[..., None], 255, RGB),
        note="white where transparent",
    ),
    Case("GIF", "animated", lambda: pillow(_two[0], "GIF", save_all=True, append_images=_two[1:]), RGB, note=_FIRST),
    Case("BMP", "colour, 24 bits", lambda: pillow(RGB, "BMP"), RGB),
    Case("BMP", "colour, 16 bits", bmp16, np.rint((RGB >> 3) / 31 * 255)),
    Case("BMP", "grey, 8 bits", lambda: pillow(GREY, "BMP"), GREY),
    Case("BMP", "1 bit", lambda: pillow(Image.fromarray(_bits(1) == 1), "BMP"), _bits(1) * 255),
    Case("JPEG 2000", "colour", lambda: pillow(RGB, "JPEG2000"), RGB),
    Case("JPEG 2000", "grey, 16 bits", lambda: pillow(_deep, "JPEG2000"), range="dtype", refused="more than 8 bits"),
    Case("AVIF", "grey", lambda: pillow(GREY, "AVIF", quality=100), GREY, note="if Pillow supports it"),
    Case("HEIC", "any", lambda: b"\0\0\0\x18ftypheic" + bytes(12), refused="it looks like HEIC"),
    Case("JPEG XL", "any", lambda: b"\xff\x0a" + bytes(12), refused="it looks like JPEG XL"),
    Case("PSD", "any", lambda: b"8BPS\0\1" + bytes(20), refused="it looks like PSD"),
    Case("OpenEXR", "any", lambda: b"\x76\x2f\x31\x01" + bytes(20), refused="it looks like OpenEXR"),
    Case("SVG", "any", lambda: b'<?xml version="1.0"?><svg/>', refused="it looks like SVG"),
]  # fmt: skip


def tiny_interlaced() -> bytes:
    """Return an interlaced PNG of one pixel, which requires only Adam7's first pass."""
    return png(RGB[:1, :1], 8, 2, interlaced=True)


def table() -> str:
    """Return the rows of the table in the guide."""
    return "\n".join(["| format | stored as | read |", "|---|---|---|", *(case.row for case in CASES)])


if __name__ == "__main__":
    print(table())
