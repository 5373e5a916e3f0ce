"""Pixels are read correctly or the file is rejected, for every row of docs/guide/image-formats.md."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.images.bit_depth import Depth, depth_of
from m3ae_fast.images.decoding import check_precision, decode_image, pixels_of
from tests.helpers.image_formats import CASES, GREY, NEEDS_RANGE, Case, png, table, tiff

READ = [case for case in CASES if not case.refused]


def label(case: Case) -> str:
    return f"{case.fmt}, {case.stored}"


def expected(case: Case) -> torch.Tensor:
    """Return the expected pixels, int32 [3, H, W]."""
    pixels = torch.from_numpy(np.ascontiguousarray(case.pixels).astype(np.int32))
    return pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


@pytest.mark.parametrize("value_range", ["dtype", (0, 4095), (1000, 60_000)])
def test_each_value_becomes_the_nearest_8_bit_value(value_range):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    low, high = (0, 65_535) if value_range == "dtype" else value_range
    exact = 255 * (np.clip(values.astype(np.float64), low, high) - low) / (high - low)
    found = decode_image(png(values, 16, 0), 1, value_range)[0].numpy()
    assert np.abs(found - exact).max() <= 0.5


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(("kind", "name"), [("unsigned", "uint"), ("signed", "int")])
def test_the_limits_of_a_bit_depth_are_those_of_numpy(kind, name, bits):
    limits = np.iinfo(f"{name}{bits}")
    assert Depth(kind, bits).limits == (limits.min, limits.max)


def test_jpeg_2000_is_read_up_to_8_bits():
    """The byte for the number of bits contains the number minus one, plus 128 if the values are signed."""
    file = BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG2000")
    data = bytearray(file.getvalue())
    first = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[first : first + 9 : 3] == bytes([7, 7, 7])
    for component in range(3):
        for precision in (0, 6, 7, 8, 11, 15, 128 + 7):
            changed = data.copy()
            changed[first + 3 * component] = precision
            if precision <= 7:
                check_precision(bytes(changed))
            else:
                with pytest.raises(BadSample, match="more than 8 bits"):
                    check_precision(bytes(changed))


def skip_without_avif(case: Case) -> None:
    if case.fmt == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")


@pytest.mark.parametrize("case", READ, ids=label)
def test_decoded_pixels_differ_by_at_most_one_8_bit_value_from_the_true_colours(case):
    """The pixels are the same whether the file or the opened image is given. Models with one and with four channels
    read the same colours. A format with a value range is refused without one."""
    skip_without_avif(case)
    data = case.make()
    colour, grey, alpha = (decode_image(data, channels, case.range).float() for channels in (3, 1, 4))
    assert decode_image(data, 3, case.range).dtype == torch.uint8 and colour.shape == expected(case).shape
    assert (colour - expected(case)).abs().max() <= 1
    opened = pixels_of(Image.open(BytesIO(data)), 3, case.range)
    assert (opened.float() - colour).abs().max() <= 1
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * colour).sum(0, keepdim=True)
    assert (grey - luma).abs().max() <= 1.5
    opaque = (alpha[3:] == 255).expand(3, -1, -1)
    assert opaque.any() and (alpha[:3] - colour)[opaque].abs().max() <= 1
    assert (colour[~opaque] == 255).all()
    for channels in (1, 3, 4) if case.range else ():
        with pytest.raises(BadSample, match=NEEDS_RANGE):
            decode_image(data, channels)


@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=label)
def test_unsupported_images_are_refused_by_name(case):
    with pytest.raises(BadSample, match=case.refused):
        decode_image(case.make(), 3, case.range)


@pytest.mark.parametrize(
    "case", [case for case in READ if case.fmt in ("PNG", "TIFF") and "alone" in case.note], ids=label
)
def test_16_bit_colour_images_cannot_be_clipped_to_a_range(case):
    with pytest.raises(BadSample, match=r'only with model\.value_range "dtype"'):
        decode_image(case.make(), 3, (0, 4095))


def test_a_range_clips_values_and_distinguishes_adjacent_ones():
    """The values of a thermal camera differ only in their low byte."""
    values = np.arange(29_000, 29_256, dtype=np.uint16).reshape(16, 16)
    for data in (tiff(values), png(values, 16, 0)):
        found = decode_image(data, 1, (29_000, 29_255))
        assert found.flatten().tolist() == list(range(256))
        assert decode_image(data, 1, (29_100, 29_101)).unique().tolist() == [0, 255]


def test_a_range_does_not_affect_8_bit_images():
    for case in (case for case in READ if not case.range):
        skip_without_avif(case)
        assert torch.equal(decode_image(case.make(), 3, (0, 4095)), decode_image(case.make(), 3))


def test_images_made_from_arrays_have_the_bit_depth_of_their_mode():
    for array, depth in ((np.zeros((2, 2), np.uint16), "unsigned 16"), (np.zeros((2, 2), np.float32), "float 32")):
        assert str(depth_of(Image.fromarray(array))).startswith(depth)
    assert not depth_of(Image.fromarray(GREY)).is_deep


def test_the_guides_table_of_image_formats_is_current():
    guide = Path(__file__).parents[2] / "docs" / "guide" / "image-formats.md"
    assert table() in guide.read_text(encoding="utf-8"), "python -m tests.helpers.image_formats prints the rows"


def damaged(data: bytes, random: np.random.RandomState) -> bytes:
    """Return `data` with some bytes changed or with a part removed, doubled or cut off."""
    found = bytearray(data)
    for position in random.randint(0, len(found), random.randint(0, 6)):
        found[position] = random.choice([0, 1, 127, 128, 255, random.randint(256)])
    start, length = random.randint(len(found)), random.randint(1, 40)
    what = random.randint(4)
    if what == 1:
        del found[start : start + length]
    elif what == 2:
        found[start:start] = found[start : start + length]
    elif what == 3:
        del found[max(start, 8) :]
    return bytes(found)


@pytest.mark.parametrize("seed", range(4))
def test_malformed_images_give_an_image_or_a_bad_sample(seed):
    """Random bytes are changed, removed or repeated in a file of any format except AVIF."""
    random = np.random.RandomState(seed)
    sources = [(case.make(), case.range) for case in READ if case.fmt != "AVIF"]
    good = bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest removes the filter that `decoding` sets when it is imported
        for _ in range(250):
            data, value_range = sources[random.randint(len(sources))]
            try:
                image = decode_image(damaged(data, random), random.choice([1, 3, 4]), value_range)
            except BadSample:
                bad += 1
            else:
                assert image.dtype == torch.uint8 and image.dim() == 3 and image.numel()
                good += 1
    assert good > 25 and bad > 25
