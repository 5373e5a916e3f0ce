import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from simplejpeg import decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.images import decoding
from m3ae_fast.images.crops import centre_crop, draw_box, random_crop, resize
from m3ae_fast.images.decoding import decode_image
from tests.helpers.shards import picture


def encode(image, fmt, **options):
    out = BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def gradient(mode="RGB", size=(48, 32)):
    """Return a smooth image, which JPEG hardly changes."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([255 * x, 255 * y, 255 * (1 - x)], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def close(image, reference, tolerance):
    expected = torch.from_numpy(np.array(reference)).reshape(*reference.size[::-1], -1).permute(2, 0, 1)
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize(
    "source, fmt, tolerance",
    [
        ("RGB", "JPEG", 12),
        ("L", "JPEG", 12),
        ("CMYK", "JPEG", 12),
        ("RGB", "PNG", 1),
        ("L", "PNG", 1),
        ("1", "PNG", 1),
        ("P", "PNG", 1),
        ("RGB", "WEBP", 30),
        ("RGB", "GIF", 1),
        ("RGB", "BMP", 1),
        ("RGB", "TIFF", 1),
    ],
)
def test_images_of_all_formats_and_modes_are_decoded(source, fmt, tolerance, channels, mode):
    data = encode(gradient(source), fmt, **({"quality": 100} if fmt in ("JPEG", "WEBP") else {}))
    close(decode_image(data, channels), Image.open(BytesIO(data)).convert("RGB").convert(mode), tolerance)


def test_cmyk_images_are_converted_to_the_original_colours():
    close(decode_image(encode(gradient("CMYK"), "JPEG", quality=100), 3), gradient(), 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 8, 16))
    image = image.quantize() if mode == "P" else image.convert(mode)
    decoded = decode_image(encode(image, "PNG"), 3)
    assert decoded[:, 0, 15].tolist() == [255, 255, 255]
    assert decoded[0, 0, 0] < 100
    if mode == "RGBA":
        assert decode_image(encode(image, "PNG"), 4)[:, 0, 15].tolist() == [200, 0, 0, 0]


@pytest.mark.parametrize("fmt, mode", [("JPEG", "RGB"), ("JPEG", "CMYK")])
def test_exif_orientation_is_applied(fmt, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # the image must be rotated clockwise
    data = encode(gradient(mode), fmt, exif=exif, quality=100)
    close(decode_image(data, 3), gradient().rotate(-90, expand=True), 20)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_orientation_in_xmp_is_applied(mode):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(gradient(mode), "JPEG", xmp=xmp, quality=100)
    close(decode_image(data, 3), gradient(mode).convert("RGB").rotate(-90, expand=True), 12)


def test_damaged_metadata_of_a_jpeg_are_ignored():
    data = encode(gradient(), "JPEG", exif=b"Exif\0\0damaged", quality=100)
    close(decode_image(data, 3), gradient(), 12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (33, 65), (200, 160)])
def test_pillow_returns_the_pixels_of_simplejpeg(monkeypatch, channels, mode, size):
    """Without simplejpeg, which has no wheels for some versions of Python, Pillow decodes JPEGs."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
    forms = [{"quality": 30}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1}]
    files = [encode(image, "JPEG", **form) for form in forms]
    files += [data[:-2] + b"extra" + data[-2:] for data in files]  # Pillow reads these even if simplejpeg is installed
    read = []
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *arguments: (read.append(1), decode_jpeg(*arguments))[1])
    found = [decode_image(data, channels) for data in files]
    assert len(read) == len(files)
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    for data, pixels in zip(files, found):
        assert torch.equal(decode_image(data, channels), pixels)


def test_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for fmt in ("GIF", "WEBP", "PNG"):
        data = encode(
            frames[0], fmt, save_all=True, append_images=frames[1:], **({"lossless": True} if fmt == "WEBP" else {})
        )
        assert decode_image(data, 3)[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)


WHOLE = picture(0, (64, 64))
PNG = picture(0, (64, 64), fmt="PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GIF89a",
        b"plain text",
        b"RIFF\0\0\0\0WEBPVP8 ",
        WHOLE[:200],
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-60],
        PNG[: len(PNG) // 2],
        PNG[:100] + bytes(100) + PNG[200:],
    ],
)
def test_broken_images_are_bad_samples(data):
    with pytest.raises(BadSample):
        decode_image(data, 3)


def test_postscript_is_not_executed():
    """Pillow would otherwise start Ghostscript."""
    with pytest.raises(BadSample, match="not an image in a known format"):
        decode_image(encode(gradient(), "EPS"), 3)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(12_000, 12_000), (20_000, 20_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused(size):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(BadSample, match="pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + ihdr + idat, 3)


def test_random_crops_equal_those_of_torchvision():
    """A crop equals torchvision's for the same box, and boxes have the same distribution as torchvision's."""
    image = decode_image(encode(gradient(size=(500, 400)), "JPEG"), 3)
    generator = torch.Generator()
    for seed in range(20):
        found = random_crop(image, 64, (0.2, 1.0), False, generator.manual_seed(seed))
        box = draw_box(400, 500, (0.2, 1.0), torch.rand(41, generator=generator.manual_seed(seed)).tolist())
        expected = F.resized_crop(image, *box, [64, 64], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(found, expected)
        assert found.is_contiguous()

    torch.manual_seed(0)
    theirs = RandomResizedCrop(64, scale=(0.2, 1.0))
    theirs = np.array([list(theirs.make_params([image]).values()) for _ in range(4000)], dtype=float)
    ours = np.array([draw_box(400, 500, (0.2, 1.0), torch.rand(41).tolist()) for _ in range(4000)], dtype=float)
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 6
    assert np.abs(theirs.std(0) - ours.std(0)).max() < 6


@settings(max_examples=100, derandomize=True, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_fallback_crop_equals_that_of_torchvision(height, width, seed):
    """A box with five times the area of the image never fits."""
    theirs = RandomResizedCrop(64, scale=(5, 5)).make_params([torch.zeros(1, height, width)])
    draws = torch.rand(41, generator=torch.Generator().manual_seed(seed)).tolist()
    assert draw_box(height, width, (5, 5), draws) == tuple(theirs[name] for name in ("top", "left", "height", "width"))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (7, 5)])
def test_tiny_and_thin_images_are_cropped(size):
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    for seed in range(5):
        for crop in (
            random_crop(image, 16, (0.2, 1.0), True, torch.Generator().manual_seed(seed)),
            centre_crop(image, 16),
        ):
            assert crop.shape == (3, 16, 16)
            assert (crop == 77).all()


def test_half_of_the_random_crops_are_flipped():
    image = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    flipped = 0
    for seed in range(200):
        plain = random_crop(image, 16, (0.5, 1.0), False, torch.Generator().manual_seed(seed))
        crop = random_crop(image, 16, (0.5, 1.0), True, torch.Generator().manual_seed(seed))
        assert torch.equal(crop, plain) or torch.equal(crop, plain.flip(-1))
        flipped += not torch.equal(crop, plain)
    assert 70 < flipped < 130


def test_the_centre_crop_is_the_central_square():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 200
    assert (centre_crop(image, 10) == 200).all()
    assert torch.equal(centre_crop(image[..., 10:30], 20), image[..., 10:30])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    edge=st.integers(1, 19), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99),
    channels=st.sampled_from([1, 3, 5]),
)  # fmt: skip
@example(edge=7, height=5, width=1, seed=0, channels=1)
@example(edge=7, height=30, width=1, seed=0, channels=3)
def test_values_of_16_bits_and_floats_are_resized_as_pillow_does_and_never_wrap(edge, height, width, seed, channels):
    """At an edge from black to white, bicubic interpolation overshoots below 0 and above 65535."""
    image = torch.zeros(channels, 20, 20)
    image[..., edge:] = 65535
    image[..., :3, :] = torch.randint(65536, (channels, 3, 20), generator=torch.Generator().manual_seed(seed))
    planes = [Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BICUBIC) for plane in image]
    exact = torch.from_numpy(np.stack(planes))
    torch.testing.assert_close(resize(image, height, width), exact, rtol=0, atol=0.5)
    found = resize(image.to(torch.uint16), height, width)
    assert found.dtype == torch.uint16
    torch.testing.assert_close(found.float(), exact.clamp(0, 65535), rtol=0, atol=1.0)
