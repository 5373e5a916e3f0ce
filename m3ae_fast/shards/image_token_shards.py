"""Shards whose images are crops with precomputed VQGAN token ids.

Each sample consists of a crop as JPEG, KEY.ids (its ids, int32, little-endian, row-major) and the other members of the
original sample. Training uses these crops unchanged (`data.image_tokens` "shards"), because another crop would
have different ids.

Shapes: C channels, S x S pixels and L ids of a crop.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import chosen_device
from m3ae_fast.base.randomness import seed32
from m3ae_fast.config import Range, check_range_argument
from m3ae_fast.data.index import MAX_IMAGE_BYTES, MISSING, index_shards
from m3ae_fast.data.reader import IDS_DTYPE
from m3ae_fast.data.shard_store import ShardStore, expand
from m3ae_fast.images.crops import centre_crop, random_crop
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.shards.settings import Settings
from m3ae_fast.shards.shrink import jpeg
from m3ae_fast.shards.sources.interface import Record, Records
from m3ae_fast.shards.writer import Converted, convert
from m3ae_fast.vqgan.model import VQGAN

_SPLIT = "tokenized"
AHEAD = 32  # crops per batch of the VQGAN
QUALITY = 95  # quality of the crops' JPEGs; ids are computed from the decoded JPEGs


@dataclass(eq=False)
class Crops(Records):
    """Records that contain crops of the images in shards, and the token ids of the crops."""

    shards: list[str]
    store: ShardStore  # cache for remote shards
    vqgan: VQGAN  # on the device on which it runs
    size: int  # S, the side of a crop in pixels
    views: int | None  # number of random crops per image; None: the central square
    scale: tuple[float, float]  # smallest and largest fraction of the area that a random crop covers
    flip: bool
    seed: int
    threads: int  # threads that prepare crops for the VQGAN
    image_range: Range | None = None  # values of black and white in images with more than 8 bits per channel

    def __post_init__(self) -> None:
        self._found = index_shards(self.shards, self.store, progress=True)
        super().__init__({_SPLIT: np.array([entry.summary.images * (self.views or 1) for entry in self._found])})
        if not self.splits[_SPLIT]:
            raise UserError(f"shards {self.shards[0]!r}: contain no images")
        self.identity = {
            "kind": "tokenized",
            "vqgan": weights_digest(self.vqgan.state_dict()),
            "image_size": self.size,
            "views": self.views,
            "crop_scale": list(self.scale),
            "flip": self.flip,
            "seed": self.seed,
            "shards": [hashlib.sha256(entry.table().tobytes()).hexdigest()[:12] for entry in self._found],
        } | ({} if self.image_range is None else {"image_range": self.image_range})
        self._table: tuple[int, np.ndarray] = (-1, np.empty(0))  # number of a shard, and its rows with an image
        self._ready: dict[int, Record | BadSample] = {}

    def name(self, split: str, number: int) -> str:
        shard, index = self.place(split, number)
        return f"{self._found[shard].shard}, image {index // (self.views or 1)}"

    def images(self, split: str) -> np.ndarray:
        return np.arange(self.splits[split]) // (self.views or 1)

    def read(self, split: str, number: int) -> Record:
        if number not in self._ready:
            last = min(number + AHEAD, self.splits[split])
            self._ready = self._prepare(range(number, last))
        found = self._ready.pop(number)
        if isinstance(found, BadSample):
            raise found
        return found

    def _prepare(self, numbers: range) -> dict[int, Record | BadSample]:
        """Return the records with these numbers. Their token ids are computed in one batch."""
        places = [self._find(number) for number in numbers]
        with ThreadPoolExecutor(self.threads) as pool:
            crops = list(pool.map(self._crop, places))
        images = [crop[0] for crop in crops if not isinstance(crop, BadSample)]
        device = self.vqgan.codebook.device
        ids_BL = self.vqgan.encode(torch.stack(images).to(device)).cpu().numpy() if images else ()
        ids = iter(ids_BL)
        ready: dict[int, Record | BadSample] = {}
        for number, crop in zip(numbers, crops):
            if isinstance(crop, BadSample):
                ready[number] = crop
            else:
                _, jpeg, others = crop
                ready[number] = Record(jpeg, members={**others, "ids": next(ids).astype(IDS_DTYPE).tobytes()})
        return ready

    def _find(self, number: int) -> tuple[int, int, int, np.void]:
        """Return the location of a record: the number of its shard, the number of its image in this shard, the number
        of its view of the image, and the offsets of the sample's members."""
        shard, index = self.place(_SPLIT, number)
        row, view = divmod(index, self.views or 1)
        if self._table[0] != shard:
            try:
                table = self._found[shard].table()
            except OSError as error:
                raise BadSample(f"{self._found[shard].shard}: cannot be read ({error})") from None
            self._table = shard, table[table["image_offset"] != MISSING]
        return shard, row, view, self._table[1][row]

    def _crop(self, place: tuple[int, int, int, np.void]) -> tuple[Tensor, bytes, dict[str, bytes]] | BadSample:
        """Return the decoded crop, uint8 [C, S, S], its JPEG, and the sample's other members."""
        shard, row, view, entry = place
        parts = {"json": "json", "cls": "cls"} if entry["json"] else {"txt": "text", "json": "json", "cls": "cls"}
        try:
            with open(self.store.path(self._found[shard].shard), "rb") as file:
                read = partial(_read, file.fileno(), entry)
                others = {name: read(part) for name, part in parts.items() if entry[f"{part}_offset"] != MISSING}
                image = decode_image(read("image"), 3, self.image_range)
        except BadSample as error:
            return error
        except OSError as error:
            return BadSample(f"the shard cannot be read ({error})")
        if self.views is None:
            crop = centre_crop(image, self.size)
        else:
            generator = torch.Generator().manual_seed(seed32(self.seed, shard, row, view))
            crop = random_crop(image, self.size, self.scale, self.flip, generator)
        data = jpeg(crop, QUALITY)
        return decode_image(data, 3), data, others


def _read(fd: int, entry: np.void, part: str) -> bytes:
    size = int(entry[f"{part}_size"])
    data = os.pread(fd, min(size, MAX_IMAGE_BYTES), int(entry[f"{part}_offset"]))
    if len(data) != size:
        raise BadSample("the shard ends inside the sample")
    return data


def image_tokens(
    shards: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    vqgan: str | os.PathLike[str],
    image_size: int = 256,
    views: int | None = 1,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    seed: int = 0,
    image_range: Range | None = None,
    samples_per_shard: int = Settings.samples_per_shard,
    device: Device | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Converted:
    """Create shards of crops with their VQGAN token ids, and return counts of the result. A repeated call resumes an
    interrupted one.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        out: output folder: a new folder, or the folder of a call with the same arguments.
        vqgan: folder of a converted VQGAN.
        image_size: side of the crops in pixels.
        views: number of random crops per image; None: the central square.
        crop_scale: smallest and largest fraction of the image's area that a random crop covers.
        flip: whether to flip half of the random crops horizontally.
        seed: random seed of the crops.
        image_range: values of black and white in images with more than 8 bits per channel; "dtype": the limits of the
            data type.
        samples_per_shard: maximum number of samples in a shard.
        device: device that runs the VQGAN, "cpu" or "cuda"; None: a GPU if there is one, otherwise the CPU.
        workers: number of worker processes, or of threads if the VQGAN runs on a GPU; None: one per core.
        cache_dir: cache folder for copies of remote shards; None: ~/.cache/m3ae_fast.

    Raises:
        UserError: an argument is invalid, a shard or the VQGAN cannot be read, or `out` cannot be written.
    """
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop-scale {low:g} {high:g}: must be two fractions with 0 < LOW <= HIGH <= 1")
    check_range_argument(image_range)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, number in (("image-size", image_size), ("views", views), ("workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: must be 1 or more")
    settings = Settings(samples_per_shard, image_size, QUALITY, keep_order=True)
    chosen = chosen_device(device)
    loaded = VQGAN.from_pretrained(Path(vqgan))
    if image_size % (stride := loaded.config.stride):
        raise UserError(f"--image-size {image_size}: is not a multiple of {stride}, the stride of the VQGAN in pixels")
    loaded.to(chosen)
    on_cpu = chosen.type == "cpu"
    crops = Crops(
        expand(shards),
        ShardStore(cache_dir),
        loaded,
        image_size,
        views,
        (low, high),
        flip,
        seed,
        threads=1 if on_cpu else workers,
        image_range=image_range,
    )
    return convert(crops, Path(out), settings, workers if on_cpu else 1)
