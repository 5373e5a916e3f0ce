"""Statistics of samples: pixels, sizes, captions, formats, labels.

Shapes: C channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.batch.images import decode_image, format_of
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import Range
from m3ae_fast.data.corpus import Corpus, Source
from m3ae_fast.data.labels import LEFT_OUT, Label, read_labels, select_labelled
from m3ae_fast.data.order import permutation
from m3ae_fast.data.reader import Reader
from m3ae_fast.errors import UserError
from m3ae_fast.progress import track


@dataclass
class Statistics:
    """Of the samples that were looked at."""

    of: int  # samples that there are
    channels: int
    seen: int = 0
    images: int = 0
    fractions_C256: Tensor = field(init=False)  # float64, how often each level is met; every image weighs the same
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height in pixels
    lengths: list[int] = field(default_factory=list)  # of captions, in tokens, without a tokenizer in words
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[Label | None] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)  # by reason

    def __post_init__(self) -> None:
        self.fractions_C256 = torch.zeros(self.channels, 256, dtype=torch.float64)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return both per channel, of pixels / 255, as `model.image_mean` and `image_std` want them."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        fractions_C256 = self.fractions_C256 / max(1, self.images)
        mean_C = fractions_C256 @ levels
        std_C = (fractions_C256 @ levels**2 - mean_C**2).clamp_min(0).sqrt()
        return [round(x, 4) for x in mean_C.tolist()], [round(max(x, 1e-4), 4) for x in std_C.tolist()]


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
) -> Statistics:
    """Look at `samples` samples of the corpus.

    Args:
        corpus: from `open_corpus`.
        samples, seed: how many are drawn, and which.
        channels, image_range: how images are decoded.
        tokenizer: that cuts captions; None: words are counted.
        labels: "cls", or "json." and the name of a field.

    Raises:
        UserError: a shard or a label cannot be read.
    """
    found = Statistics(corpus.samples, channels)
    drawn = sample(corpus, samples, seed)
    for of_source in read_labels(drawn, labels):
        found.labels.update(of_source)
    places = [(source, number) for source in drawn.sources for number in range(sum(source.sizes))]
    readers: dict[int, Reader] = {}
    for source, number in track(places, "looking at samples", len(places)):
        reader = readers.setdefault(id(source), Reader(source, corpus.store))
        try:
            _look(found, reader, source, number, image_range, tokenizer)
        except (BadSample, OSError) as error:
            found.bad[str(error)] += 1
        found.seen += 1
    return found


def _look(
    found: Statistics,
    reader: Reader,
    source: Source,
    number: int,
    image_range: Range | None,
    tokenizer: CaptionTokenizer | None,
) -> None:
    data, caption = reader.read(*reader.find(number))
    if caption is not None:
        found.lengths.append(len(tokenizer.encode(caption)) if tokenizer else len(caption.split()))
    if data is None:
        return
    image = decode_image(data, found.channels, image_range)
    found.images += 1
    found.formats[format_of(data)] += 1
    found.sizes.append((image.shape[2], image.shape[1]))
    for fractions_256, plane in zip(found.fractions_C256, image):
        fractions_256 += torch.bincount(plane.flatten(), minlength=256) / plane.numel()


def require_images(found: Statistics) -> None:
    """Raise UserError if no image could be read."""
    if not found.images:
        reason = f", such as: {next(iter(found.bad))}" if found.bad else ""
        raise UserError(f"none of {found.seen:,} samples has an image that can be read{reason}")
