"""Images with any number of bands, as .npy and TIFF files of 8, 16 and 32 bits."""

import json
import re
import struct
import sys
import tarfile
import warnings
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import prepare_image
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.cli.shards import main as data_tools
from m3ae_fast.config import ModelConfig
from m3ae_fast.images import bands, decoding
from m3ae_fast.images.bands import read_npy, write_npy
from m3ae_fast.images.bit_depth import Depth, check_colours, depth_of
from m3ae_fast.images.crops import centre_crop, random_crop, resize
from m3ae_fast.images.decoding import decode_image, format_of, pixels_of_bands, size_of
from m3ae_fast.images.normalisation import from_unit, model_input, normalised, to_unit
from m3ae_fast.shards.shrink import as_member
from tests.data.test_image_formats import damaged
from tests.helpers.image_formats import RGB, png, tiff
from tests.helpers.shards import write_tar

BANDS = 13
_random = np.random.RandomState(0)
LEVELS = _random.randint(0, 256, (20, 24, BANDS), dtype=np.uint8)
DEEP = _random.randint(0, 65536, (20, 24, BANDS), dtype=np.uint16)
FLOATS = (_random.randn(20, 24, BANDS) * 300).astype(np.float32)
ARRAYS = {"uint8": LEVELS, "uint16": DEEP, "float32": FLOATS}


def chw(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


@pytest.mark.parametrize("name", ARRAYS)
def test_values_are_kept_in_their_own_dtype(name):
    values = ARRAYS[name]
    files = [
        write_npy(values),
        write_npy(np.asfortranarray(values)),
        write_npy(values.astype(values.dtype.newbyteorder())),
    ]
    files += [tiff(values, planarconfig="contig"), tiff(values, planarconfig="contig", compression="zlib")]
    files += [tiff(values.transpose(2, 0, 1).copy(), planarconfig="separate")]
    for data in files:
        found = decode_image(data, BANDS, "dtype", name)
        assert found.dtype == getattr(torch, name) and torch.equal(found, chw(values))
    assert [format_of(data) for data in files[2:4]] == ["NPY", "TIFF"]
    one = decode_image(write_npy(values[..., 0]), 1, "dtype", name)
    assert torch.equal(one, chw(values)[:1])


def test_a_range_defines_the_values_of_black_and_white():
    scaled = (DEEP.astype(np.float64) - 1000) / 9000
    data = write_npy(DEEP)
    assert torch.equal(
        decode_image(data, BANDS, (1000, 10_000)), chw(np.rint(255 * scaled.clip(0, 1)).astype(np.uint8))
    )
    fine = decode_image(data, BANDS, (1000, 10_000), "uint16")
    assert torch.equal(fine, chw(np.rint(65535 * scaled.clip(0, 1)).astype(np.uint16)))
    floats = decode_image(data, BANDS, (1000, 10_000), "float32")
    assert torch.equal(floats, chw(scaled.astype(np.float32))) and floats.min() < 0 and floats.max() > 1
    assert torch.equal(
        decode_image(write_npy(FLOATS), BANDS, (-100, 300), "float32"),
        chw((FLOATS.astype(np.float64) + 100) / 400).float(),
    )
    for dtype in ("uint16", "float32"):  # the range does not apply to 8-bit levels
        unit = decode_image(write_npy(LEVELS), BANDS, (0, 9), dtype).double() / (65535 if dtype == "uint16" else 1)
        torch.testing.assert_close(unit, chw(LEVELS) / 255.0, check_dtype=False, rtol=0, atol=1e-7)
    for values in (DEEP, FLOATS):
        with pytest.raises(BadSample, match=r"has .*-bit values: set model\.value_range"):
            decode_image(write_npy(values), BANDS)


def test_images_read_by_pillow_keep_their_bit_depth():
    """Images that Pillow reads keep their precision in a model with more than 8 bits."""
    values = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    for data in (png(values, 16, 0), tiff(values)):
        assert torch.equal(decode_image(data, 3, "dtype", "uint16"), torch.from_numpy(values).expand(3, -1, -1))
    assert torch.equal(
        decode_image(tiff(values, photometric="miniswhite"), 1, "dtype", "uint16")[0], torch.from_numpy(65535 - values)
    )
    clear = png(values, 16, 0, (b"tRNS", struct.pack(">H", values[3, 3])))
    on_white = torch.from_numpy(np.where(values == values[3, 3], 65535, values))
    assert torch.equal(decode_image(clear, 1, "dtype", "uint16")[0], on_white)
    torch.testing.assert_close(decode_image(clear, 1, "dtype", "float32")[0], (on_white / 65535).float())
    colours = np.dstack((values, values[::-1], values))
    assert torch.equal(decode_image(tiff(colours, photometric="rgb"), 3, (0, 65535), "uint16"), chw(colours))
    levels = decode_image(png(RGB, 8, 2), 3)
    assert torch.equal(decode_image(png(RGB, 8, 2), 3, None, "uint16"), (levels.int() * 257).to(torch.uint16))
    for data, channels, message in (
        (png(colours, 16, 2), 3, "colour channels of unsigned 16-bit values, of which Pillow reads only 8 bits"),
        (png(values, 16, 0), 4, "has one channel of unsigned 16-bit values, but the model expects 4"),
    ):
        with pytest.raises(BadSample, match=message):
            decode_image(data, channels, "dtype", "uint16")


def test_bit_depths_are_read_from_tiff_tags():
    for tags, expected in (
        ({}, Depth("unsigned", 1)),
        ({258: (8, 16, 8)}, Depth("unsigned", 16)),
        ({258: (8,), 339: (2,), 262: 1}, Depth("signed", 8)),
        ({258: (32,), 339: (3,), 262: 0}, Depth("float", 32, white_is_zero=True)),
        ({258: (8,), 339: (9,)}, Depth("unknown", 8)),
    ):
        assert depth_of(SimpleNamespace(tag_v2=tags)) == expected
    signed = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    assert torch.equal(
        decode_image(tiff(signed), 1, "dtype")[0], torch.from_numpy(signed.astype(np.int16) + 128).byte()
    )


def test_colour_images_reduced_to_8_bits_require_the_full_unsigned_range():
    plain = SimpleNamespace(info={})
    check_colours(plain, Depth("unsigned", 16), "dtype", "uint8")
    for depth, value_range, info in (
        (Depth("signed", 16), "dtype", {}),
        (Depth("float", 32), "dtype", {}),
        (Depth("unsigned", 16), (0, 4095), {}),
        (Depth("unsigned", 16), "dtype", {"transparency": 0}),
    ):
        with pytest.raises(BadSample, match="colour channels"):
            check_colours(SimpleNamespace(info=info), depth, value_range, "uint8")


def test_the_fourth_channel_of_a_multi_channel_image_is_not_transparency():
    four = LEVELS[..., :4]
    with_fourth = tiff(four, photometric="rgb", extrasamples=["unspecified"])
    for data in (write_npy(four), with_fourth):
        assert torch.equal(decode_image(data, 4), chw(four))
    # a model of grey or colour images reads the TIFF as a colour image with an extra channel
    assert torch.equal(decode_image(with_fourth, 3), chw(four)[:3]) and len(decode_image(with_fourth, 1)) == 1


@pytest.mark.parametrize(
    "data, channels, message",
    [
        (write_npy(LEVELS), 3, r"the array \[20, 24, 13\] has 13 channels, but the model expects 3"),
        (tiff(LEVELS, planarconfig="contig"), 3, "has 13 channels, but the model expects 3"),
        (png(RGB, 8, 2), BANDS, "has 3 channels, but the model expects 13"),
        (write_npy(DEEP.astype(np.int16)), BANDS, "the array has dtype int16, but must be uint8, uint16 or float32"),
        (write_npy(LEVELS[None]), BANDS, r"the array has shape \[1, 20, 24, 13\], but must have"),
        (write_npy(LEVELS[:0]), BANDS, r"the array has shape \[0, 24, 13\], but must have"),
        (write_npy(np.where(FLOATS > 800, np.inf, FLOATS)), BANDS, "has values that are not finite"),
        (write_npy(LEVELS)[:-1], BANDS, "the array is damaged"),
        (write_npy(LEVELS).replace(b"(20, 24", b"(2e9,24"), BANDS, "the array is damaged"),
        (write_npy(LEVELS).replace(b"(20, 24, 13)", b"(True,24,13)"), BANDS, "the array is damaged"),
        (b"\x93NUMPY\x03\0", BANDS, "the array is damaged"),
        (tiff(LEVELS, planarconfig="contig", extratags=[(274, 3, 1, 6, True)]), BANDS, "with bands that is rotated"),
        (tiff(LEVELS, planarconfig="contig")[:-1], BANDS, "the TIFF is damaged"),
    ],
)  # fmt: skip
def test_images_that_do_not_match_the_model_are_bad_samples(data, channels, message):
    with pytest.raises(BadSample, match=message):
        decode_image(data, channels, "dtype")


def test_a_pickle_in_an_array_file_is_not_loaded():
    objects = np.array([[{"a": 1}]], dtype=object)
    out = bands.BytesIO()
    np.save(out, objects, allow_pickle=True)
    with pytest.raises(BadSample, match="the array is damaged"):
        read_npy(out.getvalue())


def test_image_sizes_have_a_limit(monkeypatch):
    """An image may be exactly as large as the limit."""
    for data in (write_npy(LEVELS), tiff(LEVELS, planarconfig="contig")):
        monkeypatch.setattr(bands, "MAX_VALUES", LEVELS.size)
        assert torch.equal(decode_image(data, BANDS), chw(LEVELS))
        monkeypatch.setattr(bands, "MAX_VALUES", LEVELS.size - 1)
        with pytest.raises(BadSample, match=r"\d+ values"):
            decode_image(data, BANDS)
    for data, size in {png(RGB, 8, 2): RGB.shape[:2], write_npy(LEVELS): LEVELS.shape[:2]}.items():
        monkeypatch.setattr(decoding, "MAX_PIXELS", size[0] * size[1])
        assert size_of(data) == size
        monkeypatch.setattr(decoding, "MAX_PIXELS", size[0] * size[1] - 1)
        with pytest.raises(BadSample, match=r"pixels|not a valid image"):
            size_of(data)


@pytest.mark.parametrize("pages", [2, 3])
def test_the_first_of_several_pages_is_read(pages):
    out = bands.BytesIO()
    tifffile.imwrite(out, np.stack([LEVELS, *([LEVELS[::-1]] * (pages - 1))]), planarconfig="contig", metadata=None)
    assert torch.equal(decode_image(out.getvalue(), BANDS), chw(LEVELS))


def test_the_error_names_tifffile_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadSample, match=re.escape("pip install 'm3ae-fast[tiff]'")):
        decode_image(tiff(LEVELS, planarconfig="contig"), BANDS)


def test_pillow_logs_nothing_for_a_bad_sample(caplog):
    data = bytearray(tiff(RGB, photometric="rgb"))
    place = data.index(struct.pack("<HHI", 277, 3, 1)) + 8  # position of SamplesPerPixel
    data[place : place + 2] = struct.pack("<H", 2048)
    with pytest.raises(BadSample):
        decode_image(bytes(data), 3)
    assert not caplog.records


def test_malformed_files_give_an_image_or_a_bad_sample():
    random = np.random.RandomState(0)
    sources = [
        make(values) for values in ARRAYS.values() for make in (write_npy, lambda v: tiff(v, planarconfig="contig"))
    ]
    good = bad = 0
    for _ in range(200):
        try:
            image = decode_image(
                damaged(sources[random.randint(len(sources))][:4000], random), BANDS, "dtype", "uint16"
            )
        except BadSample:
            bad += 1
        else:
            assert image.shape[0] == BANDS
            good += 1
    for source in sources:
        good += len(decode_image(source, BANDS, "dtype", "uint16")) == BANDS
    assert bad > 25 and good >= len(sources)


@pytest.mark.parametrize("name", ARRAYS)
def test_each_channel_is_resampled_like_an_image(name):
    image = chw(ARRAYS[name])
    for height, width in ((7, 9), (31, 40)):
        found = resize(image, height, width)
        assert found.dtype == image.dtype and found.shape == (BANDS, height, width)
        for first in range(0, BANDS - 2, 3):
            alone = resize(image[first : first + 3].clone(), height, width)
            assert (found[first : first + 3].double() - alone.double()).abs().max() <= (1 if name == "uint8" else 1e-3)
    as_floats = np.stack([
        np.asarray(Image.fromarray(band.astype(np.float32)).resize((9, 7), Image.Resampling.BICUBIC))
        for band in ARRAYS[name].transpose(2, 0, 1)
    ])  # fmt: skip
    limits = {"uint8": (0, 255), "uint16": (0, 65535)}.get(name, (-np.inf, np.inf))
    error = np.abs(resize(image, 7, 9).double().numpy() - as_floats.clip(*limits)).max()
    assert error <= {"uint8": 1.5, "uint16": 1.0, "float32": 1e-2}[name]


def test_multi_channel_images_are_cropped_and_flipped_like_images():
    """The same seed gives the same box and the same flip in every dtype."""

    def crop(image, seed):
        return random_crop(image, 8, (0.3, 1.0), True, torch.Generator().manual_seed(seed))

    for seed in range(6):
        levels, deep = crop(chw(LEVELS), seed), crop((chw(LEVELS).int() * 257).to(torch.uint16), seed)
        assert deep.is_contiguous() and (deep.double() / 257 - levels.double()).abs().mean() < 1
    assert torch.equal(centre_crop(chw(DEEP), 20), chw(DEEP)[:, :, 2:22])


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("count", [1, BANDS])
def test_decoded_pixels_are_writable_and_not_shared(name, count):
    values = ARRAYS[name][..., :count].copy()
    before, data = values.copy(), write_npy(values)
    for read in (partial(pixels_of_bands, values), partial(decode_image, data)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's warning about memory that is not writable
            found = read(count, "dtype", name)
        expected = found.clone()
        found.zero_()
        assert np.array_equal(values, before) and torch.equal(read(count, "dtype", name), expected)
        assert found.is_contiguous()


def test_pixels_are_normalised_relative_to_the_value_range():
    mean, std = [0.1 * i for i in range(BANDS)], [0.2 + 0.1 * i for i in range(BANDS)]
    for name, white in (("uint8", 255), ("uint16", 65535)):
        image = chw(ARRAYS[name])
        assert model_input(image, mean, std) is image
        found = normalised(image[None], mean, std)[0]
        expected = (image.double() / white - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(to_unit(found, mean, std), image / white, rtol=1e-4, atol=1e-5)
    floats = model_input(chw(FLOATS), mean, std)
    assert torch.equal(floats, from_unit(chw(FLOATS), mean, std)) and normalised(floats, mean, std) is floats


def test_shards_preserve_channels_and_values(tmp_path):
    """A small array is stored unchanged. A large one is reduced in its own dtype, whatever its file format."""
    for values in ARRAYS.values():
        for data in (write_npy(values), tiff(values, planarconfig="contig")):
            suffix, kept = as_member(data, 320, 95)
            assert suffix == "npy" and np.array_equal(read_npy(kept), values)
            small = read_npy(as_member(data, 10, 95)[1])
            assert small.shape == (10, 12, BANDS) and small.dtype == values.dtype
            assert np.array_equal(small, resize(chw(values), 10, 12).permute(1, 2, 0).numpy())
    assert as_member(png(RGB, 8, 2), 320, 95)[0] == "jpg"


def test_a_native_image_may_have_any_number_of_channels():
    config = ModelConfig(
        size="small", channels=BANDS, image_dtype="uint16", resize="native", image_size=32, patch_size=8, vocab_size=0,
        image_mean=(0.5,) * BANDS, image_std=(0.25,) * BANDS, value_range="dtype",
    )  # fmt: skip
    seen = prepare_image(DEEP, config)
    assert seen.dtype == torch.uint16 and seen.shape[0] == BANDS
    sample = Sample("a", seen, torch.zeros(seen.shape[1] * seen.shape[2] // 64, dtype=torch.bool))
    assert pack([sample], Geometry.of(config)).images.dtype == torch.uint16


def test_hugging_face_arrays_become_shards(tmp_path):
    features = datasets.Features({
        "image": datasets.Array3D((20, 24, BANDS), "uint16"), "label": datasets.ClassLabel(names=["a", "b"]),
    })  # fmt: skip
    data = datasets.Dataset.from_dict({"image": [DEEP, DEEP[::-1].copy()], "label": [0, 1]}, features=features)
    data.save_to_disk(tmp_path / "in")
    assert (
        data_tools(["make", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1", "--keep-order"])
        == 0
    )
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        arrays = [read_npy(tar.extractfile(name).read()) for name in sorted(tar.getnames()) if name.endswith(".npy")]
    assert np.array_equal(arrays[0], DEEP) and np.array_equal(arrays[1], DEEP[::-1])


def test_statistics_are_computed_per_channel(tmp_path, capsys):
    arrays = [write_npy(FLOATS), write_npy(FLOATS + 50), write_npy(LEVELS[..., :3])]
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.npy", data) for i, data in enumerate(arrays)])
    command = ["stats", shard, "--cache-dir", str(tmp_path), "--channels", str(BANDS), "--dtype", "float32"]
    assert data_tools([*command, "--value-range=-100,100", "--out", str(tmp_path / "a.png")]) == 0
    output = capsys.readouterr().out
    mean, std = (json.loads(re.search(rf"model.image_{name}=(\S+)", output)[1]) for name in ("mean", "std"))
    both = (np.stack([FLOATS, FLOATS + 50]).astype(np.float64) + 100) / 200
    assert np.abs(both.mean((0, 1, 2)) - mean).max() < 1e-4 and np.abs(both.std((0, 1, 2)) - std).max() < 1e-4
    assert 'model.image_dtype="float32"' in output and "has 3 channels, but the model expects 13" in output
    assert Image.open(tmp_path / "a.png").width > 600
    with pytest.raises(UserError, match="--channels 0: must be greater than or equal to 1"):
        data_tools([*command, "--channels", "0"])
