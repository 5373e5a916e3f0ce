"""Small shards made on the spot."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from m3ae_fast.config import DataConfig, MaskingConfig, SourceConfig
from m3ae_fast.data import ShardStore, build_loader, load_tokenizer, open_corpus
from m3ae_fast.data.tokenizer import train_tokenizer
from m3ae_fast.model.packing import Geometry

WORDS = ["red", "green", "blue", "cat", "dog", "tree", "house", "river"]


def picture(number=0, size=(40, 30), mode="RGB", fmt="JPEG", **options):
    """Encoded noise that depends on `number`."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.RandomState(number).randint(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode=mode).save(out, fmt, **options)
    return out.getvalue()


def caption(number):
    """Two to six words that depend on `number`."""
    return " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(2 + number % 5))


def members(numbers, kind="paired"):
    """(name, bytes) of good samples."""
    for number in numbers:
        if kind != "text":
            yield f"{number:05d}.jpg", picture(number)
        if kind != "image":
            yield f"{number:05d}.txt", caption(number).encode()


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([caption(i) for i in range(40)], 200).save(str(path))
    return str(path)


@pytest.fixture
def load(store, tokenizer_file):
    """load(shards | [SourceConfig], micro_batch=..., ...) -> loader with small pictures and captions."""

    def build(sources, *, micro_batch=4, seed=0, masking=None, tokenizer=True, train=True, config=None, **options):
        if not isinstance(sources, list) or isinstance(sources[0], str):
            sources = [SourceConfig(shards=sources)]
        data = DataConfig(train=sources, **{"workers": 0, **(config or {})})
        return build_loader(
            data,
            open_corpus(sources, store),
            load_tokenizer(tokenizer_file, 8) if tokenizer else None,
            Geometry(image_size=32, patch_size=8, channels=3, text_length=8),
            masking or MaskingConfig(image_ratio=0.5, text_ratio=0.5),
            seed=seed,
            micro_batch=micro_batch,
            train=train,
            **options,
        )

    return build
