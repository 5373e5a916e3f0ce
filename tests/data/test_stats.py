import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.cli.shards import main
from m3ae_fast.config import SourceConfig, load_config
from m3ae_fast.data import open_corpus
from m3ae_fast.shards.statistics import collect, sample
from tests.helpers.image_formats import png
from tests.helpers.shards import caption, members, picture, write_tar
from tests.helpers.trainer import TINY

KINDS = ["GIF", "PNG"]
SIZES = [(40, 30), (30, 30), (20, 60), (64, 16)]


@pytest.fixture
def shards(tmp_path):
    """Write two shards: eight pairs of several sizes and formats with a class, four captions, and two broken images."""
    good = [
        file
        for i in range(8)
        for file in (
            (f"{i}.{KINDS[i % 2].lower()}", picture(i, SIZES[i % 4], fmt=KINDS[i % 2])),
            (f"{i}.txt", caption(i).encode()),
            (f"{i}.cls", str(i % 3).encode()),
        )
    ]
    write_tar(tmp_path / "a.tar", good)
    write_tar(tmp_path / "b.tar", [*members(range(8, 12), "text"), ("12.jpg", b"no image"), ("13.jpg", b"no image")])
    return str(tmp_path / "?.tar")


def pixels(shape):
    """Return the mean and the mean square of each image's pixels / 255, float64 [images, 2, C], or [images, 2] if the
    mode `shape` has one channel."""
    found = []
    for i in range(8):
        file = picture(i, SIZES[i % 4], fmt=KINDS[i % 2])
        image = np.asarray(Image.open(BytesIO(file)).convert(shape)) / 255
        found.append((image.mean((0, 1)), (image**2).mean((0, 1))))
    return np.array(found)


def look(shards, store, samples=1000, seed=0, channels=3, value_range=None, tokenizer=None):
    corpus = open_corpus([SourceConfig(shards=shards)], store)
    return collect(corpus, samples, seed, channels, value_range, tokenizer, "cls")


def test_statistics_equal_those_of_numpy(shards, store):
    found = look(shards, store)
    means, squares = pixels("RGB").mean(0)
    mean, std = found.mean_and_std()
    assert np.abs(mean - means).max() < 1e-4 and np.abs(std - np.sqrt(squares - means**2)).max() < 1e-4
    assert (found.seen, found.of, found.images) == (14, 14, 8)
    assert found.sizes == [SIZES[i % 4] for i in range(8)]
    assert found.lengths == [len(caption(i).split()) for i in range(12)]
    assert found.formats == {"PNG": 4, "GIF": 4}
    assert found.labels == {0: 3, 1: 3, 2: 2, None: 6}
    assert list(found.bad.values()) == [2] and "not an image" in next(iter(found.bad))
    torch.testing.assert_close(found.fractions_C256.sum(1), torch.full((3,), 8.0, dtype=torch.float64))


def test_captions_are_counted_in_tokens(shards, store, tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file, 1 << 16)
    assert look(shards, store, tokenizer=tokenizer).lengths == [len(tokenizer.encode(caption(i))) for i in range(12)]


def test_the_random_sample_depends_only_on_its_seed(tmp_path, store):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", members(range(20), "text"))
    sources = [SourceConfig(shards=str(tmp_path / f"{name}.tar")) for name in "abc"]
    corpus = open_corpus(sources, store)

    def keys(samples, seed):
        drawn = sample(corpus, samples, seed)
        return [(s.shard, key) for source in drawn.sources for s in source.shards for key in s.table()["key"].tolist()]

    first = keys(12, 0)
    assert len(first) == len(set(first)) == 12 and first == sorted(first)
    assert keys(12, 0) == first != keys(12, 1)
    assert set(first) < set(keys(24, 0))
    assert len(keys(1000, 0)) == 60
    assert len({shard for shard, _ in first}) == 3


@pytest.mark.parametrize("channels, shape", [(1, "L"), (4, "RGBA")])
def test_the_stats_command_prints_and_writes_settings(shards, tmp_path, capsys, channels, shape):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | {"model": TINY["model"] | {"channels": 3}}))
    picture_file = tmp_path / "stats.png"
    command = ["stats", shards, "--channels", str(channels), "--cache-dir", str(tmp_path / "cache")]
    command += ["--out", str(picture_file), "--write", str(config), "--value-range", "dtype"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for text in (
        "14 of 14 samples", "cannot be read: 2 (14.29%", "2: the file is not an image in a known format",
        "width: median", "GIF 4",
        "different labels: 3 (0 3, 1 3, 2 2)", f"--set model.channels={channels}", '--set model.value_range="dtype"',
        "words: median",
    ):  # fmt: skip
        assert text in out
    written = load_config(config)
    expected = pixels(shape)[:, 0].reshape(8, -1).mean(0)
    assert len(written.model.image_mean) == channels == written.model.channels
    assert np.abs(np.array(written.model.image_mean) - expected).max() < 2e-3
    assert written.model.value_range == "dtype"
    assert f"--set model.image_mean={json.dumps(list(written.model.image_mean), separators=(',', ':'))}" in out
    assert Image.open(picture_file).width > 600


def test_high_bit_depth_images_are_counted_with_their_value_range(tmp_path, store):
    values = np.arange(600, 856).reshape(16, 16)
    shard = write_tar(tmp_path / "a.tar", [("0.png", png(values, 16, 0))])
    found = look(shard, store, channels=1, value_range=(600, 855))
    assert torch.equal(found.fractions_C256, torch.full((1, 256), 1 / 256, dtype=torch.float64))
    assert "set model.value_range" in next(iter(look(shard, store).bad))


def test_user_errors_are_reported_in_one_line(shards, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model": {"size": "tiny"}}')
    texts = write_tar(tmp_path / "texts.tar", members(range(3), "text"))
    for arguments, message in (
        ([shards, "--channels", "0"], "--channels 0: must be greater than or equal to 1"),
        ([texts], "none of 3 samples has an image that can be read$"),
        ([shards, "--write", str(tmp_path / "none.json")], r"--write .*none\.json: cannot be read"),
        ([shards, "--write", str(config)], r"--write .*config\.json: model.size"),
        ([shards, "--tokenizer", str(config)], r"--tokenizer .*config\.json: is not a tokenizer"),
        ([shards, "--labels", "json"], "must be cls, or json.FIELD"),
    ):
        with pytest.raises(UserError, match=message):
            main(["stats", *arguments, "--cache-dir", str(tmp_path / "cache")])
    assert config.read_text() == '{"model": {"size": "tiny"}}'


def test_the_error_for_multi_channel_images_suggests_the_options(tmp_path, capsys):
    npy = BytesIO()
    np.save(npy, np.arange(8 * 8 * 5, dtype=np.uint16).reshape(8, 8, 5))
    write_tar(tmp_path / "a.tar", [("0.npy", npy.getvalue())])
    with pytest.raises(UserError, match=r"has 5 channels, but the model expects 3; try --channels 5 --dtype uint16 --"):
        main(["stats", str(tmp_path / "a.tar")])
    assert main(["stats", str(tmp_path / "a.tar"), "--channels=5", "--dtype=uint16", "--value-range=0,400"]) == 0
    capsys.readouterr()
    with pytest.raises(UserError, match=r"can be read; first error: the image is empty$"):
        main(["stats", write_tar(tmp_path / "b.tar", [("0.png", b"")])])
