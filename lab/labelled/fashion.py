"""Fashion-MNIST (arXiv 1708.07747) from Debian's package: 70,000 grey images of clothes, 28 x 28 pixels.

Shapes: N images.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lab.labelled.packages import fetch, read_members
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.sources.interface import Record, Records

LICENCE = "MIT, Copyright 2017 Zalando SE"
COMMAND = ["apt-get", "download", "dataset-fashion-mnist"]
FOLDER = "usr/share/datasets/fashion-mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FILES = {"train": "train", "val": "t10k"}  # the official test set is held out


class Fashion(Records):
    """Records of all images, with classes and without captions."""

    classes = CLASSES

    def __init__(self, package: Path | None, downloads: Path):
        """Open `package` or, if it is None, download it to `downloads` first. Raises UserError if the package cannot be
        downloaded or read."""
        package = package or fetch(COMMAND, downloads, ".deb")
        files = read_members(package, FOLDER, ".gz")
        try:
            self._images = {s: parse_idx(files[f"{name}-images-idx3-ubyte.gz"]) for s, name in _FILES.items()}
            self._labels = {s: parse_idx(files[f"{name}-labels-idx1-ubyte.gz"]) for s, name in _FILES.items()}
        except (KeyError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{package}: is not Fashion-MNIST as Debian packs it ({error})") from None
        super().__init__({split: np.ones(len(own), np.int64) for split, own in self._images.items()})
        self.identity = {"kind": "fashion-mnist", "package": package.name, "licence": LICENCE}

    def name(self, split: str, number: int) -> str:
        return f"Fashion-MNIST's {split} image {number}"

    def read(self, split: str, number: int) -> Record:
        out = io.BytesIO()
        Image.fromarray(self._images[split][number]).save(out, "PNG")
        label = int(self._labels[split][number])
        return Record(out.getvalue(), label=label, about={"name": CLASSES[label]})


def parse_idx(packed: bytes) -> np.ndarray:
    """Return the array in a gzipped IDX file of bytes, uint8 [N, ...]. Raises ValueError or OSError if it is not such a
    file."""
    data = gzip.decompress(packed)
    if data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + shape.nbytes).reshape(shape)
