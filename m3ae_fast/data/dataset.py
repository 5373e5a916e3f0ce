"""The dataset that maps indices in the sample order to samples for the model.

A sample's crop, flip and masks depend only on (seed, source, epoch, sample, view). With `repeats` R, the positions R k
to R k + R - 1 are views of the k-th sample in the order. They may share their crop (`Preparation.one_crop`).

Shapes: C channels, H x W pixels, L patches of an image, n tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3ae_fast.base.bad_samples import BadSample, Skipped
from m3ae_fast.base.randomness import Purpose, RandomStreams
from m3ae_fast.batch.masking import MaskSampler
from m3ae_fast.batch.packing import Geometry, Sample
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.order import FileOrder, Order, Place
from m3ae_fast.data.reader import Reader
from m3ae_fast.images.crops import random_crop, whole_view
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.images.normalisation import model_input
from m3ae_fast.vqgan.model import VQGAN

# A function of an image [C, H, W] (uint8, uint16 or float32) and a seed, which returns an image of the same shape and
# dtype. The seed must be its only source of randomness.
Transform = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Augment:
    """Settings of the augmentation: the smallest and largest fraction of the image area for RandomResizedCrop, and
    whether to flip half of the images horizontally."""

    crop_scale: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class Preparation:
    """Settings that determine how samples become model inputs."""

    geometry: Geometry  # geometry of the model
    masking: MaskingConfig
    tokenizer: CaptionTokenizer | None  # None if there are no captions
    seed: int  # seed of the run
    image_tokenizer: VQGAN | None = None  # computes the images' token ids in the loader
    transform: Transform | None = None  # function that is applied to each cropped image
    one_crop: bool = False  # whether all views of a sample have the crop of the first one, so that only masks differ
    # the loader counts the FLOPs of this model for each batch; None: they are not counted
    counted_for: ModelConfig | None = None


class _Draft(NamedTuple):
    """The views of a sample before its image is decoded, and the bytes of the image."""

    samples: list[Sample]
    views: Sequence[int]
    image: bytes | None
    place: Place
    skip: Callable[[str], Skipped]  # creates a Skipped from a reason


def _key(place: Place, view: int) -> tuple[int, ...]:
    """Return the key on which a view's random numbers depend."""
    return (*place, view) if view else place


@dataclass(eq=False)
class Samples(Dataset[Sample | Skipped]):
    """A dataset that reads, decodes, augments, tokenises and masks the samples at given positions."""

    corpus: Corpus
    order: Order | FileOrder
    preparation: Preparation
    augment: Augment | None  # None: no augmentation; the central square or the whole native image is used
    positions_per_mask: int  # number of positions per step, which share a mask if `masking.per` is "batch"
    repeats: int = 1  # number of consecutive views of each sample

    def __post_init__(self) -> None:
        self._readers = [Reader(source, self.corpus.store) for source in self.corpus.sources]
        seed = self.preparation.seed
        self._streams, self._masks = RandomStreams(seed), MaskSampler(self.preparation.masking, seed)

    def __getitem__(self, position: int) -> Sample | Skipped:
        """Return the sample at `position`, or the reason why it is skipped."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample | Skipped]:
        """Return the samples of a whole micro-batch, which may be empty. The DataLoader calls this method.

        All images are decoded last, because decoding evicts the contents of the CPU caches, and other work between two
        images would then take twice as long.
        """
        groups = [list(views) for _, views in groupby(positions, lambda position: position // self.repeats)]
        drafts = [self._without_image(views) for views in groups]
        found = [s for draft in drafts for s in (self._with_image(draft) if isinstance(draft, _Draft) else draft)]
        self._add_ids([sample for sample in found if isinstance(sample, Sample) and sample.image is not None])
        return found

    def _without_image(self, positions: Sequence[int]) -> _Draft | list[Skipped]:
        """Return the views at `positions`, which all belong to one sample, before its image is decoded; or the reason
        why each of them is skipped."""
        index = positions[0] // self.repeats
        place = self.order.locate(index)
        reader = self._readers[place.source]
        shard, row = reader.find(place.sample)
        name, key = reader.source.shards[shard].shard, f"sample {row}"
        try:
            key = reader.key(shard, row)
            image, caption = reader.read(shard, row)
            tokens = None if caption is None else self._tokens(caption)
        except (BadSample, OSError) as error:
            return [Skipped(name, key, str(error))] * len(positions)
        source, geometry = reader.source, self.preparation.geometry
        views = [position % self.repeats for position in positions]
        samples = []
        for position, view in zip(positions, views):
            key_of_view = _key(place, view)
            image_mask, text_mask = self._masks.image_and_text(
                geometry.patches_per_image, geometry.text_length, key_of_view, self._step(position)
            )
            sample = Sample(
                f"{name}/{key}",
                tokens=tokens,
                image_mask=None if image is None else image_mask,  # a native image's mask is sampled later
                text_mask=None if tokens is None else text_mask[: len(tokens)].clone(),
                label=None if source.labels is None else int(source.labels[place.sample]),
                image_hash="" if image is None or self.augment else blake2b(image, digest_size=8).hexdigest(),
                loss_weight=source.loss_weight,
                draw=self._streams.seed(Purpose.FORWARD, *key_of_view) >> 33,
                position=position,
            )
            if self.augment is not None:
                sample.text_predicted = self._masks.predicted_tokens(sample.text_mask, key_of_view)
            samples.append(sample)
        return _Draft(samples, views, image, place, partial(Skipped, name, key))

    def _with_image(self, draft: _Draft) -> Sequence[Sample | Skipped]:
        if draft.image is None:
            return draft.samples
        try:
            geometry = self.preparation.geometry
            image = decode_image(draft.image, geometry.channels, geometry.value_range, geometry.image_dtype)
        except BadSample as error:
            return [draft.skip(str(error))] * len(draft.samples)
        shared_CSS = self._input(image, draft.place) if self.preparation.one_crop else None
        for sample, view in zip(draft.samples, draft.views):
            key = _key(draft.place, view)
            assert sample.position is not None
            image_CSS = self._input(image, key) if shared_CSS is None else shared_CSS
            sample.image, sample.same_image = image_CSS, shared_CSS is not None and sample is not draft.samples[0]
            if geometry.native is not None:
                rows, columns = geometry.grid(image_CSS)
                sample.image_mask = self._masks.image(rows * columns, key, self._step(sample.position))
            if self.augment is not None:
                sample.image_predicted = self._masks.predicted_patches(sample.image_mask, key)
        return draft.samples

    def _tokens(self, caption: str) -> Tensor:
        """Return the tokens of a caption. Raises BadSample if the tokenizer fails on it."""
        assert self.preparation.tokenizer is not None  # the loader requires one
        return torch.from_numpy(self.preparation.tokenizer.encode(caption))

    def _add_ids(self, samples: list[Sample]) -> None:
        if samples and (vqgan := self.preparation.image_tokenizer):
            images = torch.stack([sample.image for sample in samples if sample.image is not None])
            for sample, ids in zip(samples, vqgan.encode(images)):
                sample.image_ids = ids

    def _step(self, position: int) -> int:
        """Return the number of the step that a position belongs to."""
        return position // self.positions_per_mask

    def _input(self, image: Tensor, key: tuple[int, ...]) -> Tensor:
        """Return the crop of a decoded image as the model expects it."""
        crop = self._crop(image, key)
        if self.preparation.transform:
            crop = self.preparation.transform(crop, self._streams.seed(Purpose.TRANSFORM, *key))
        geometry = self.preparation.geometry
        return model_input(crop, geometry.image_mean, geometry.image_std)

    def _crop(self, image: Tensor, key: tuple[int, ...]) -> Tensor:
        frame = self.preparation.geometry.frame
        if self.augment is None:
            return whole_view(image, frame)
        generator = self._streams.generator(Purpose.CROP, *key)
        return random_crop(image, frame, self.augment.crop_scale, self.augment.flip, generator)
