"""Positions of the stream -> samples for the model.

A sample's crop, flip and masks depend on (seed, source, epoch, sample) alone.

Shapes: C channels, S x S pixels, L patches a picture, n tokens of a caption.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3ae_fast.config import MaskingConfig
from m3ae_fast.data.corpus import Corpus, Reader, Skipped
from m3ae_fast.data.decode import BadSample, centre_crop, decode_image, random_crop
from m3ae_fast.data.order import FileOrder, Order, Place, hash64
from m3ae_fast.data.tokenizer import CaptionTokenizer
from m3ae_fast.model.masking import draw_mask
from m3ae_fast.model.packing import Geometry, Sample

# What a random number is for, so that no two uses share a stream.
_CROP, _MASK, _BATCH_MASK = range(3)
FETCHING = "fetch shards ahead"  # the thread's name


@dataclass(frozen=True)
class Augment:
    """RandomResizedCrop's share of the area, and whether to mirror half of the pictures."""

    crop_scale: tuple[float, float]
    flip: bool


class Samples(Dataset):
    """Reads, decodes, augments, tokenises and masks the samples at given positions.

    Args:
        corpus: where samples come from.
        order: which one stands where.
        tokenizer: for captions; needed where the corpus has any.
        geometry: the model's sizes.
        masking: ratios, and what shares a mask.
        augment: None: the central square as it is.
        seed: the run's.
        share_mask: with `masking.per` "batch", how many positions in a row have one mask: a step's, over all ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order | FileOrder,
        tokenizer: CaptionTokenizer | None,
        geometry: Geometry,
        masking: MaskingConfig,
        augment: Augment | None,
        seed: int,
        share_mask: int,
    ):
        self.order = order
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.masking = masking
        self.augment = augment
        self.seed = seed
        self.share_mask = share_mask
        self._store = corpus.store
        self._readers = [Reader(source, corpus.store) for source in corpus.sources]
        self._cached = [any(corpus.store.is_cached(s.shard) for s in source.shards) for source in corpus.sources]
        self._ahead: dict[int, tuple[int, ...]] = {}  # by source: the shards that were last asked for ahead
        self._generator = torch.Generator()

    def __getitem__(self, position: int) -> Sample | Skipped:
        """The sample at `position`, or why there is none."""
        place = self.order.locate(position)
        self._fetch_ahead(position)
        reader = self._readers[place.source]
        shard, row = reader.find(place.sample)
        name = reader.source.shards[shard].shard
        try:
            key = reader.key(shard, row)
        except OSError as error:
            return Skipped(name, f"sample {row}", str(error))
        try:
            return self._make(f"{name}/{key}", *reader.read(shard, row), place, position // self.share_mask)
        except (BadSample, OSError) as error:
            return Skipped(name, key, str(error))

    def __getitems__(self, positions: Sequence[int]) -> list[Sample | Skipped]:
        """Called by the DataLoader: a whole micro-batch, which may be empty."""
        return [self[position] for position in positions]

    def _make(self, name: str, picture: bytes | None, caption: str | None, place: Place, batch: int) -> Sample:
        sample = Sample(name)
        if picture is not None:
            sample.image = self._crop(decode_image(picture, self.geometry.channels), place)
        if caption is not None:
            sample.tokens = torch.from_numpy(self.tokenizer.encode(caption))
        self._mask(sample, place, batch)
        return sample

    def _crop(self, image: Tensor, place: Place) -> Tensor:
        if self.augment is None:
            return centre_crop(image, self.geometry.image_size)
        generator = self._seeded(_CROP, *place)
        return random_crop(image, self.geometry.image_size, self.augment.crop_scale, self.augment.flip, generator)

    def _mask(self, sample: Sample, place: Place, batch: int) -> None:
        """Masks are drawn over the whole text length and cut to the caption, as the official code does."""
        generator = self._seeded(_MASK, *place) if self.masking.per == "sample" else self._seeded(_BATCH_MASK, batch)
        image_mask = draw_mask(self.geometry.patches_per_image, self.masking.image_ratio, generator)
        text_mask = draw_mask(self.geometry.text_length, self.masking.text_ratio, generator)
        if sample.image is not None:
            sample.image_mask = image_mask
        if sample.tokens is not None:
            sample.text_mask = text_mask[: len(sample.tokens)].clone()

    def _seeded(self, *key: int) -> torch.Generator:
        # torch's generator takes 32 bits of a seed
        return self._generator.manual_seed(hash64(self.seed, *key) & 0xFFFFFFFF)

    def _fetch_ahead(self, position: int) -> None:
        """When a group of shards is begun, fetch the next one in the background."""
        if not any(self._cached) or isinstance(self.order, FileOrder):
            return
        source, index = self.order.turn(position)
        if not self._cached[source]:
            return
        shards = self.order.sources[source].shards_after(index)
        if self._ahead.get(source) != shards:
            self._ahead[source] = shards
            names = [self._readers[source].source.shards[shard].shard for shard in shards]
            threading.Thread(target=self._store.fetch_ahead, args=(names,), name=FETCHING, daemon=True).start()
