"""Features that are computed from the pixels of an image without a network: the baselines of learnt features.

The images are read with the channels and the value range of the files, not of a model, so the features are the same
whatever model they are compared with.

Shapes: S images, C channels, H x W pixels, D features, L patches of P x P pixels, K pairs of a layer and a pooling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library, require_libraries
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import DataConfig, ModelConfig, Pool, Range
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.images.image_kind import Kind, channels_and_dtype, kind_of
from m3ae_fast.images.normalisation import normalised, to_unit
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.shards.overview import part_of
from m3ae_fast.shards.statistics import Statistics, collect
from m3ae_fast.weights.model_name import HISTOGRAM, HOG, IMAGE_FEATURES, PIXELS

_SIZE, _PATCH = 48, 16  # sides of the image and of its patches, in pixels
_INSPECTED = 128  # number of training samples that determine how files are read, and the mean and standard deviation
_OUTLIERS = 0.05  # maximum fraction of the images with values above the range, and of those with values below it
SIDE = 16  # side of the downscaled image in pixels
_LEVELS, _BINS = 4, 16  # levels per channel of the joint histogram of three channels; bins of any other channel
_HOG = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (2, 2), "block_norm": "L2-Hys"}


class FixedFeatures(MultimodalEncoder):
    """An encoder with one feature vector per sample, which is the same for each layer and pooling. `config`: the input;
    see `input_config`."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # skips the creation of an encoder's weights
        self.config, self.tokenizer = config, None
        # needed because inference code reads the dtype of a model's weights
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    @abstractmethod
    def width(self) -> int:
        """Return D, the number of features of an image."""

    @abstractmethod
    def pooled_of_layers(self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)) -> Tensor:
        """Return the features as float32 [S, K, D]."""


class ImageFeatures(FixedFeatures):
    """Features that are computed from the pixels of an image."""

    @abstractmethod
    def features(self, images_SCHW: Tensor) -> Tensor:
        """Return the features [S, D] of at least one image, uint8 or normalised float32."""

    def pooled_of_layers(self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)) -> Tensor:
        """Return the features as float32 [S, K, D]."""
        images = batch.images
        with torch.autocast(images.device.type, enabled=False):
            found_SD = self.features(images) if len(images) else torch.zeros(0, self.width, device=images.device)
        return found_SD.float()[:, None].expand(-1, len(layers) * len(pools), -1)


class Pixels(ImageFeatures):
    """The pixels of the image, scaled to SIDE x SIDE and normalised by the mean and standard deviation of the training
    images. The features of a patch are its normalised pixels."""

    @property
    def width(self) -> int:
        return self.config.channels * SIDE**2

    def features(self, images_SCHW: Tensor) -> Tensor:
        return F.interpolate(self._normalised(images_SCHW), (SIDE, SIDE), mode="bicubic", antialias=True).flatten(1)

    def pooled_and_patches(
        self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)
    ) -> tuple[Tensor, Tensor]:
        """Return the features of `pooled_of_layers`, and the pixels of each patch, [S, K, L, C * P * P]."""
        P, L = self.config.patch_size, self.config.most_patches
        patches_SLD = batch.images.new_zeros(0, L, self.config.channels * P**2, dtype=torch.float32)
        if len(batch.images):  # a rank may have no samples
            patches_SLD = F.unfold(self._normalised(batch.images), P, stride=P).mT
        return self.pooled_of_layers(batch, layers, pools), patches_SLD[:, None].expand(-1, len(layers), -1, -1)

    def _normalised(self, images_SCHW: Tensor) -> Tensor:
        return normalised(images_SCHW, self.config.image_mean, self.config.image_std).float()


class Histogram(ImageFeatures):
    """The square root of the fraction of the pixels with each colour. With three channels, a colour is one of 4 x 4 x 4
    combinations of levels; with any other number of channels, there is a histogram of 16 bins for each channel. Because
    of the square roots, the cosine similarity of two histograms is their Bhattacharyya coefficient."""

    @property
    def width(self) -> int:
        return _LEVELS**3 if self.config.channels == 3 else _BINS * self.config.channels

    def features(self, images_SCHW: Tensor) -> Tensor:
        unit_SCN = to_unit(images_SCHW, self.config.image_mean, self.config.image_std).flatten(2)
        bins = _LEVELS if self.config.channels == 3 else _BINS
        bin_SCN = (unit_SCN * bins).long().clamp(0, bins - 1)
        if self.config.channels == 3:
            scale_C1 = bin_SCN.new_tensor([bins**2, bins, 1])[:, None]
            bin_SCN, bins = (bin_SCN * scale_C1).sum(1, keepdim=True), bins**3
        count_SCB = unit_SCN.new_zeros(*bin_SCN.shape[:2], bins)
        count_SCB.scatter_add_(2, bin_SCN, torch.ones_like(bin_SCN, dtype=count_SCB.dtype))
        return (count_SCB / bin_SCN.shape[2]).sqrt().flatten(1)


class OrientedGradients(ImageFeatures):
    """Histograms of oriented gradients (HOG; Dalal and Triggs 2005) of the image, scaled to 48 x 48: 9 orientations in
    cells of 8 x 8 pixels, blocks of 2 x 2 cells. The gradient of a pixel is that of the channel in which it is
    largest."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.hog = library("skimage.feature", "hog").hog

    @property
    def width(self) -> int:
        blocks = self.config.image_size // 8 - 1
        return blocks**2 * 4 * 9

    def features(self, images_SCHW: Tensor) -> Tensor:
        unit_SHWC = to_unit(images_SCHW, self.config.image_mean, self.config.image_std).movedim(1, 3).cpu().numpy()
        found = [self.hog(image_HWC, channel_axis=2, **_HOG) for image_HWC in unit_SHWC]
        return torch.from_numpy(np.stack(found)).float().to(images_SCHW.device)


_CLASSES: dict[str, Callable[[ModelConfig], ImageFeatures]]
_CLASSES = {PIXELS: Pixels, HISTOGRAM: Histogram, HOG: OrientedGradients}


def available() -> tuple[list[str], str]:
    """Return the names of the features whose library is installed, and a sentence about the features that are left out,
    which is "" if none are."""
    try:
        require_libraries({"skimage": "the baseline HOG"})
    except UserError as error:
        return [PIXELS, HISTOGRAM], f"{IMAGE_FEATURES[HOG]} is left out: {error}"
    return [*_CLASSES], ""


def open_image_features(
    names: Sequence[str], data: DataConfig, ranks: Ranks, image_size: int = _SIZE, patch_size: int = _PATCH
) -> dict[str, ImageFeatures]:
    """Return the features with these names for the samples of a config, in evaluation mode on the ranks' device, by
    name. Every rank must call it. Raises UserError if the training samples cannot be opened, or if a library is
    missing."""
    config = ranks.broadcast(lambda: input_config(data, image_size, patch_size))
    opened = ranks.together(lambda: {name: image_features(name, config) for name in names})
    return {name: each.to(ranks.device) for name, each in opened.items()}


def image_features(name: str, config: ModelConfig) -> ImageFeatures:
    """Return the features with this name in evaluation mode on the CPU. `config`: the input; see `input_config`. Raises
    UserError if a library is missing."""
    return _CLASSES[name](config).eval()


def input_config(data: DataConfig, image_size: int = _SIZE, patch_size: int = _PATCH) -> ModelConfig:
    """Return the input of `ImageFeatures` for the images of the training samples. Their number of channels, value
    range, mean and standard deviation are determined from some of these samples. Raises UserError if they cannot be
    opened."""
    train = open_corpus(data.train, ShardStore(data.cache_dir, data.cache_gb))
    channels, dtype, value_range = _reading(part_of(train, "train", "", None, _INSPECTED).kinds)
    statistics = collect(train, _INSPECTED, 0, channels, value_range, None, None, dtype)
    return _input(statistics, image_size, patch_size)


def input_of_files(paths: Sequence[str]) -> ModelConfig:
    """Return the input of `ImageFeatures` for image files, which is determined from some of them, as `input_config`
    does. Files that cannot be read are left out."""
    inspected = [paths[number] for number in np.linspace(0, len(paths) - 1, min(_INSPECTED, len(paths))).astype(int)]
    images, kinds = [], []
    for path in inspected:
        with suppress(BadSample, OSError):  # unreadable images are reported when they are encoded
            images.append(Path(path).read_bytes())
            kinds.append(kind_of(images[-1]))
    channels, dtype, value_range = _reading(kinds)
    statistics = Statistics(len(paths), channels, dtype, value_range)
    for image in images:
        with suppress(BadSample):
            statistics.add(decode_image(image, channels, value_range, dtype))
    return _input(statistics, _SIZE, _PATCH)


def _input(statistics: Statistics, image_size: int, patch_size: int) -> ModelConfig:
    mean, std = statistics.mean_and_std()
    network = {"size": None, "emb_dim": 64, "depth": 1, "num_heads": 1, "vocab_size": 0}
    images = {"channels": statistics.channels, "image_dtype": statistics.dtype, "value_range": statistics.value_range}
    images |= {"image_size": image_size, "patch_size": patch_size, "image_mean": mean, "image_std": std}
    return ModelConfig.model_validate(network | images, strict=False)


def _reading(kinds: Sequence[Kind]) -> tuple[int, str, Range | None]:
    """Return the number of channels, the dtype and the value range with which images of these kinds are read. If values
    have more than 8 bits, the range is that of the values that occur in most of the images. Colours with more
    than 8 bits per channel are read with 8 bits, as Pillow does."""
    channels, dtype = channels_and_dtype(kinds)
    deep = [kind for kind in kinds if kind.depth is not None]
    if not deep:
        return channels, dtype, None
    if any(kind.channels == 3 and not kind.is_array for kind in deep):
        return channels, "uint8", "dtype"
    # a few images with outliers would otherwise reduce the contrast of all others
    left_out = int(_OUTLIERS * len(deep))
    low, high = sorted(kind.low for kind in deep)[left_out], sorted(kind.high for kind in deep)[-1 - left_out]
    return channels, "float32", (low, high if high > low else low + 1)
