"""Shards whose images are crops with their VQGAN token ids, made ahead of time.

Each sample of OUT is a crop as JPEG, KEY.ids (its ids, int32, little-endian, row-major) and what else the sample had.
Training takes such crops as they are (`data.image_tokens` "shards"): another crop would have other ids.

Shapes: C channels, S x S pixels of a crop, L ids of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import chosen_device
from m3ae_fast.config import Range
from m3ae_fast.data.index import MAX_IMAGE_BYTES, MISSING, index_shards
from m3ae_fast.data.order import hash64
from m3ae_fast.data.reader import IDS_DTYPE
from m3ae_fast.data.shards import ShardStore, expand
from m3ae_fast.images.crops import centre_crop, random_crop
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.shards.settings import Settings
from m3ae_fast.shards.shrink import jpeg
from m3ae_fast.shards.sources.records import Record, Records
from m3ae_fast.shards.writer import convert, describe_conversion
from m3ae_fast.vqgan.model import VQGAN

_SPLIT = "tokenized"
AHEAD = 32  # crops that the VQGAN takes together
QUALITY = 95  # of the crops' JPEGs; ids are of what they decode to


@dataclass(eq=False)
class Crops(Records):
    """Crops of the images in some shards, with their ids."""

    shards: list[str]
    store: ShardStore  # where copies of remote shards go
    vqgan: VQGAN  # on the device where it is to run
    size: int  # S
    views: int | None  # random crops of each image; None: its central square
    scale: tuple[float, float]  # this and the next two: of the random crops
    flip: bool
    seed: int
    threads: int  # that prepare crops for the VQGAN
    image_range: Range | None = None  # of images of more than 8 bits

    def __post_init__(self) -> None:
        self._found = index_shards(self.shards, self.store, progress=True)
        super().__init__({_SPLIT: np.array([entry.summary.images * (self.views or 1) for entry in self._found])})
        if not self.splits[_SPLIT]:
            raise UserError(f"shards {self.shards[0]!r}: no image in them")
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
        self._table: tuple[int, np.ndarray] = (-1, np.empty(0))  # of a shard: rows with an image
        self._ready: dict[int, Record | BadSample] = {}

    def name(self, split: str, number: int) -> str:
        shard, turn = self.place(split, number)
        return f"{self._found[shard].shard}, image {turn // (self.views or 1)}"

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
        """Return the records of some numbers, with the ids of all of them made at once."""
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
        """Return shard, row of the image in it, view, and where the sample's members lie."""
        shard, turn = self.place(_SPLIT, number)
        row, view = divmod(turn, self.views or 1)
        if self._table[0] != shard:
            try:
                table = self._found[shard].table()
            except OSError as error:
                raise BadSample(f"{self._found[shard].shard}: cannot be read ({error})") from None
            self._table = shard, table[table["image_offset"] != MISSING]
        return shard, row, view, self._table[1][row]

    def _crop(self, place: tuple[int, int, int, np.void]) -> tuple[Tensor, bytes, dict[str, bytes]] | BadSample:
        """Return uint8 [C, S, S] as the JPEG decodes, the JPEG, and the sample's other members."""
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
            generator = torch.Generator().manual_seed(hash64(self.seed, shard, row, view) & 0xFFFFFFFF)
            crop = random_crop(image, self.size, self.scale, self.flip, generator)
        data = jpeg(crop, QUALITY)
        return decode_image(data, 3), data, others


def _read(fd: int, entry: np.void, part: str) -> bytes:
    size = int(entry[f"{part}_size"])
    data = os.pread(fd, min(size, MAX_IMAGE_BYTES), int(entry[f"{part}_offset"]))
    if len(data) != size:
        raise BadSample("the shard ends inside the sample")
    return data


def run(args: argparse.Namespace) -> None:
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop-scale {low:g} {high:g}: must be two fractions with 0 < LOW <= HIGH <= 1")
    for name in ("image_size", "views", "samples_per_shard", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    device = chosen_device(args.device)
    vqgan = VQGAN.from_pretrained(args.vqgan)
    if args.image_size % vqgan.config.stride:
        stride = vqgan.config.stride
        raise UserError(f"--image-size {args.image_size}: is not a multiple of the {stride} pixels of a code")
    vqgan.to(device)
    on_cpu = device.type == "cpu"
    crops = Crops(
        expand(args.shards), ShardStore(args.cache_dir), vqgan, args.image_size, None if args.centre else args.views,
        (low, high), not args.no_flip, args.seed, threads=1 if on_cpu else args.workers, image_range=args.range,
    )  # fmt: skip
    settings = Settings(args.samples_per_shard, args.image_size, QUALITY, keep_order=True)
    print(describe_conversion(args.out, convert(crops, args.out, settings, args.workers if on_cpu else 1)))
