"""Small synthetic shards."""

import io
import tarfile

import numpy as np
from PIL import Image

from m3ae_fast.shards.tar_member import add_member

WORDS = ["red", "green", "blue", "cat", "dog", "tree", "house", "river"]


def picture(number=0, size=(40, 30), mode="RGB", fmt="JPEG", **options):
    """Return encoded noise that depends on `number`."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.RandomState(number).randint(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode=mode).save(out, fmt, **options)
    return out.getvalue()


def caption(number):
    """Return two to six words that depend on `number`."""
    return " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(2 + number % 5))


def members(numbers, kind="paired"):
    """Yield the members of valid samples as (name, bytes)."""
    for number in numbers:
        if kind != "text":
            yield f"{number:05d}.jpg", picture(number)
        if kind != "image":
            yield f"{number:05d}.txt", caption(number).encode()


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            add_member(tar, name, data)
    return str(path)
