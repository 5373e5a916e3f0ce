"""Positions of the stream -> samples for the model.

A sample's crop, flip and masks depend on (seed, source, epoch, sample) alone.

Shapes: C channels, S x S pixels, L patches a picture, n tokens of a caption.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3ae_fast.config import MaskingConfig
from m3ae_fast.data.bad_samples import BadSample, Skipped
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.crops import centre_crop, random_crop
from m3ae_fast.data.images import decode_image
from m3ae_fast.data.order import FileOrder, Order, Place, hash64
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.tokenizer import CaptionTokenizer
from m3ae_fast.model.masking import draw_mask
from m3ae_fast.model.packing import Geometry, Sample

# What a random number is for, so that no two uses share a stream.
_CROP, _MASK, _BATCH_MASK, _TRANSFORM = range(4)
FETCHING = "fetch shards ahead"  # the thread's name


# uint8 [C, S, S] and a seed -> the same shape; all that it draws comes from the seed
Transform = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Augment:
    """RandomResizedCrop's share of the area, and whether to mirror half of the pictures."""

    crop_scale: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class Preparation:
    """How a sample becomes the model's input."""

    geometry: Geometry  # the model's sizes
    masking: MaskingConfig
    tokenizer: CaptionTokenizer | None  # None where there are no captions
    seed: int  # the run's


class _Draft(NamedTuple):
    """A sample but for its image, of which it has the bytes."""

    sample: Sample | Skipped
    image: bytes | None = None
    place: Place | None = None
    skip: Callable[[str], Skipped] | None = None  # of a reason


class Samples(Dataset):
    """Reads, decodes, augments, tokenises and masks the samples at given positions.

    Args:
        corpus: where samples come from.
        order: which one stands where.
        preparation: how they become the model's input.
        augment: None: the central square as it is.
        share_mask: with `masking.per` "batch", how many positions in a row have one mask: a step's, over all ranks.
        transform: of each picture, cropped; None: none.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order | FileOrder,
        preparation: Preparation,
        augment: Augment | None,
        share_mask: int,
        transform: Transform | None = None,
    ):
        self.order = order
        self.preparation = preparation
        self.augment = augment
        self.share_mask = share_mask
        self.transform = transform
        self.has_captions = corpus.has_captions
        self._store = corpus.store
        self._readers = [Reader(source, corpus.store) for source in corpus.sources]
        self._cached = [any(corpus.store.is_cached(s.shard) for s in source.shards) for source in corpus.sources]
        self._ahead: dict[int, tuple[int, ...]] = {}  # by source: the shards that were last asked for ahead
        self._generator = torch.Generator()

    def __getitem__(self, position: int) -> Sample | Skipped:
        """The sample at `position`, or why there is none."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample | Skipped]:
        """Called by the DataLoader: a whole micro-batch, which may be empty.

        Everything else comes before the images: between two of them, which fill the caches, it takes twice as long.
        """
        drafts = [self._without_image(position) for position in positions]
        return [self._with_image(draft) for draft in drafts]

    def _without_image(self, position: int) -> _Draft:
        place = self.order.locate(position)
        self._fetch_ahead(position)
        reader = self._readers[place.source]
        shard, row = reader.find(place.sample)
        name, key = reader.source.shards[shard].shard, f"sample {row}"
        try:
            key = reader.key(shard, row)
            image, caption = reader.read(shard, row)
        except (BadSample, OSError) as error:
            return _Draft(Skipped(name, key, str(error)))
        sample = Sample(f"{name}/{key}")
        if reader.source.labels is not None:
            sample.label = int(reader.source.labels[place.sample])
        image_mask, text_mask = self._masks(place, position // self.share_mask)
        if image is not None:
            sample.image_mask = image_mask
        if caption is not None:
            sample.tokens = torch.from_numpy(self.preparation.tokenizer.encode(caption))
            sample.text_mask = text_mask[: len(sample.tokens)].clone()
        return _Draft(sample, image, place, partial(Skipped, name, key))

    def _with_image(self, draft: _Draft) -> Sample | Skipped:
        if draft.image is None:
            return draft.sample
        try:
            image = decode_image(draft.image, self.preparation.geometry.channels)
            draft.sample.image = self._transform(self._crop(image, draft.place), draft.place)
        except BadSample as error:
            return draft.skip(str(error))
        return draft.sample

    def _crop(self, image: Tensor, place: Place) -> Tensor:
        size = self.preparation.geometry.image_size
        if self.augment is None:
            return centre_crop(image, size)
        generator = self._seeded(_CROP, *place)
        return random_crop(image, size, self.augment.crop_scale, self.augment.flip, generator)

    def _transform(self, image: Tensor, place: Place) -> Tensor:
        if self.transform is None:
            return image
        return self.transform(image, hash64(self.preparation.seed, _TRANSFORM, *place))

    def _masks(self, place: Place, batch: int) -> tuple[Tensor, Tensor]:
        """Of patches and of text tokens, over the whole text length, as the official code draws them."""
        geometry, masking = self.preparation.geometry, self.preparation.masking
        generator = self._seeded(_MASK, *place) if masking.per == "sample" else self._seeded(_BATCH_MASK, batch)
        return (
            draw_mask(geometry.patches_per_image, masking.image_ratio, generator),
            draw_mask(geometry.text_length, masking.text_ratio, generator),
        )

    def _seeded(self, *key: int) -> torch.Generator:
        # torch's generator takes 32 bits of a seed
        return self._generator.manual_seed(hash64(self.preparation.seed, *key) & 0xFFFFFFFF)

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
