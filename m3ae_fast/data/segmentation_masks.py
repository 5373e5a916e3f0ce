"""Label masks of samples, stored as the member KEY.mask.png next to the image.

Shapes: N samples with a mask, S x S pixels of the model's input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.index import MAX_IMAGE_BYTES, MISSING, group
from m3ae_fast.data.labels import LEFT_OUT, select_labelled
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.data.tar import scan_tar
from m3ae_fast.images.label_mask import mask_view, read_mask
from m3ae_fast.images.suffixes import IMAGE_SUFFIXES, MASK_SUFFIX

_THREADS = 4


@dataclass(frozen=True)
class Masks:
    """The label masks of samples, which are read from their shards."""

    store: ShardStore
    shards: list[str]
    # int64: index of the shard, offset and size of the mask, offset and size of the image (bytes)
    places_N5: np.ndarray

    def views(self, numbers: Sequence[int], size: int, *, progress: bool = False) -> Tensor:
        """Return the masks of the samples with these numbers as class ids, uint8 [len(numbers), S, S]. They are cropped
        and scaled like the model's input (see `mask_view`). `size`: S. Raises UserError if a mask cannot be read."""
        views = torch.empty(len(numbers), size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda number: mask_view(self._read(number), size), numbers)
            for row, view in enumerate(track(found, "reading masks", len(numbers), show=progress)):
                views[row] = view
        return views

    def _read(self, number: int) -> Tensor:
        place, at, size, *of_image = self.places_N5[number].tolist()
        shard, parts = self.shards[place], ((at, size), of_image)
        try:
            with open_regular(self.store.path(shard)) as file:
                mask, image = (os.pread(file.fileno(), min(size, MAX_IMAGE_BYTES), offset) for offset, size in parts)
            return read_mask(mask, image)
        except OSError as error:
            raise UserError(f"shard {shard}: cannot be read ({error.strerror or error})") from None
        except BadSample as error:
            raise UserError(f"shard {shard}: the mask at byte {at} is invalid ({error}); repair or remove it") from None


def masked_corpus(corpus: Corpus, *, progress: bool = False) -> tuple[Corpus, Masks]:
    """Return the samples of a dataset that have an image and a mask, with consecutive numbers from 0 as labels, and
    their masks, which are accessed by these numbers. Raises UserError if no sample has a mask, or if a shard cannot be
    read."""
    shards: list[str] = []
    places: list[tuple[int, int, int, int, int]] = []
    sources = []
    for source in corpus.sources:
        located = [shard.located() for shard in source.shards]
        ids = []
        for shard in track(located, "looking for masks", len(located), show=progress):
            try:
                members, _ = scan_tar(corpus.store.path(shard.shard))
                images = shard.table()[["image_offset", "image_size"]].tolist()
            except OSError as error:
                raise UserError(f"shard {shard.shard}: cannot be read ({error.strerror or error})") from None
            masks = {}  # mask members by the offset of the image
            for _, files in group(members):
                image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
                if image is not None and MASK_SUFFIX in files:
                    masks[image.offset] = files[MASK_SUFFIX]
            for offset, size in images:
                mask = masks.get(offset) if offset != MISSING else None
                ids.append(LEFT_OUT if mask is None else len(places))
                if mask is not None:
                    places.append((len(shards), mask.offset, mask.size, offset, size))
            shards.append(shard.shard)
        sources.append(select_labelled(replace(source, shards=located), np.array(ids, dtype=np.int64)))
    if not places:
        raise UserError(
            f"shards {shards[0]}{' ...' if len(shards) > 1 else ''}: no sample has a mask, KEY.{MASK_SUFFIX} next to "
            "its image; make shards from a folder of images with --masks FOLDER"
        )
    sources = [source for source in sources if source.shards]
    return replace(corpus, sources=sources), Masks(corpus.store, shards, np.array(places, dtype=np.int64))
