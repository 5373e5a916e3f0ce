"""Statistics of samples: pixels, sizes, captions, formats, labels.

Shapes: C channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.batch.images import decode_image, format_of
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import Range
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.labels import LEFT_OUT, Label, read_labels, select_labelled
from m3ae_fast.data.order import permutation
from m3ae_fast.data.reader import Reader
from m3ae_fast.errors import UserError
from m3ae_fast.progress import track


@dataclass
class Statistics:
    """Sums and counts over the samples that were looked at."""

    of: int  # samples that there are
    channels: int
    dtype: str = "uint8"  # of `model.image_dtype`
    seen: int = 0
    images: int = 0
    # float64, every image weighs the same: how often each of 256 levels is met; sums of pixels and of their squares
    fractions_C256: Tensor = field(init=False)
    moments_2C: Tensor = field(init=False)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height in pixels
    lengths: list[int] = field(default_factory=list)  # of captions, in tokens, without a tokenizer in words
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[Label | None] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)  # by reason

    def __post_init__(self) -> None:
        self.fractions_C256 = torch.zeros(self.channels, 256, dtype=torch.float64)
        self.moments_2C = torch.zeros(2, self.channels, dtype=torch.float64)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return `model.image_mean` and `image_std`, where black is 0 and white 1."""
        mean_C, square_C = self.moments_2C / max(1, self.images)
        std_C = (square_C - mean_C**2).clamp_min(0).sqrt()
        return [round(x, 4) for x in mean_C.tolist()], [round(max(x, 1e-4), 4) for x in std_C.tolist()]

    def add(self, image: Tensor) -> None:
        """Count an image, [C, H, W] as `decode_image` gives it."""
        self.images += 1
        self.sizes.append((image.shape[2], image.shape[1]))
        unit_CN = (image.double() / LARGEST.get(image.dtype, 1)).flatten(1)
        self.moments_2C += torch.stack((unit_CN.mean(1), unit_CN.square().mean(1)))
        levels_CN = (255 * unit_CN.clamp(0, 1)).round().long()
        for fractions_256, levels_N in zip(self.fractions_C256, levels_CN):
            fractions_256 += torch.bincount(levels_N, minlength=256) / len(levels_N)


def sample(corpus: Corpus, samples: int, seed: int) -> Corpus:
    """Return a corpus of `samples` samples, or all, drawn by `seed` alone, in file order."""
    drawn = np.full(corpus.samples, LEFT_OUT, dtype=np.int64)
    drawn[permutation(corpus.samples, seed)[:samples]] = 0
    ends = np.cumsum([sum(source.sizes) for source in corpus.sources])
    parts = np.split(drawn, ends[:-1])
    return replace(corpus, sources=[select_labelled(source, part) for source, part in zip(corpus.sources, parts)])


def collect(
    corpus: Corpus,
    samples: int,
    seed: int,
    channels: int,
    image_range: Range | None,
    tokenizer: CaptionTokenizer | None,
    labels: str,
    dtype: str = "uint8",
) -> Statistics:
    """Look at `samples` samples of the corpus.

    Args:
        corpus: from `open_corpus`.
        samples, seed: how many are drawn, and which.
        channels, image_range: how images are decoded.
        tokenizer: that cuts captions; None: words are counted.
        labels: "cls", or "json." and the name of a field.
        dtype: how finely pixels are kept (`model.image_dtype`).

    Raises:
        UserError: a shard or a label cannot be read.
    """
    found = Statistics(corpus.samples, channels, dtype)
    drawn = sample(corpus, samples, seed)
    for of_source in read_labels(drawn, labels):
        found.labels.update(of_source)
    places = [(source, number) for source in drawn.sources for number in range(sum(source.sizes))]
    readers: dict[int, Reader] = {}
    for source, number in track(places, "looking at samples", len(places)):
        reader = readers.setdefault(id(source), Reader(source, corpus.store))
        try:
            data, caption = reader.read(*reader.find(number))
            if caption is not None:
                found.lengths.append(len(tokenizer.encode(caption)) if tokenizer else len(caption.split()))
            if data is not None:
                found.add(decode_image(data, channels, image_range, dtype))
                found.formats[format_of(data)] += 1
        except (BadSample, OSError) as error:
            found.bad[str(error)] += 1
        found.seen += 1
    return found


def require_images(found: Statistics) -> None:
    """Raise UserError if no image could be read."""
    if not found.images:
        reason = f", such as: {next(iter(found.bad))}" if found.bad else ""
        raise UserError(f"none of {found.seen:,} samples has an image that can be read{reason}")
