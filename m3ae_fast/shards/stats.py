"""stats: statistics of the samples (pixels, sizes, captions, formats, labels) and the settings derived from them.

Shapes: C channels.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor

from m3ae_fast.base.atomic_file import whole_file, write_whole
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.batch.tokenizer import CaptionTokenizer, load_tokenizer
from m3ae_fast.config import MAX_CHANNELS, Config, Range, SourceConfig, parse
from m3ae_fast.config.load import read_config
from m3ae_fast.data.corpus import Corpus, open_corpus
from m3ae_fast.data.labels import LEFT_OUT, Label, read_labels, select_labelled
from m3ae_fast.data.order import permutation
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.images.decoding import decode_image, format_of

_QUANTILES = (0, 0.05, 0.5, 0.95, 1)  # of a distribution, that are shown
_LONGEST = 1 << 16  # tokens
_SHOWN = 5  # labels, and reasons why samples cannot be read


def run(args: argparse.Namespace) -> None:
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be 1 or more")
    if not 1 <= args.channels <= MAX_CHANNELS:
        raise UserError(f"--channels {args.channels}: must be from 1 to {MAX_CHANNELS}")
    given = None
    if args.write is not None:
        given = read_config(args.write, "--write")
        parse(Config, given, f"--write {args.write}")
    tokenizer = load_tokenizer(args.tokenizer, _LONGEST, label="--tokenizer") if args.tokenizer else None
    corpus = open_corpus([SourceConfig(shards=args.shards)], ShardStore(args.cache_dir), progress=True)
    found = collect(corpus, args.samples, args.seed, args.channels, args.range, tokenizer, args.labels, args.dtype)
    print("\n".join(describe_statistics(found, "tokens" if tokenizer else "words")))
    require_images(found)
    settings = settings_of(found, args.range)
    print("\n".join(f"--set {section}.{key}={_compact(value)}" for section, key, value in settings))
    if args.picture is not None:
        draw(found, args.picture, "tokens" if tokenizer else "words")
    if args.sizes is not None:
        write_whole(args.sizes, json.dumps(found.sizes) + "\n")
        print(f"wrote the sizes of {len(found.sizes):,} images into {args.sizes}")
    if given is not None:
        _write_config(args.write, given, settings)


def describe_statistics(found: Statistics, unit: str) -> list[str]:
    """Return lines for the user; `unit`: of the lengths of captions."""
    lines = [f"{found.seen:,} of {found.of:,} samples"]
    if found.bad:
        fraction = found.bad.total() / found.seen
        lines.append(f"cannot be read: {found.bad.total():,} ({fraction:.2%}; see data.max_bad_fraction)")
        lines += [f"  {count:,}: {reason}" for reason, count in found.bad.most_common(_SHOWN)]
    if found.images:
        mean, std = found.mean_and_std()
        widths, heights = np.array(found.sizes).T
        lines.append(f"images: {found.images:,} ({_counts(found.formats.most_common())})")
        lines.append(f"mean {_compact(mean)}  std {_compact(std)} where black is 0 and white 1")
        for name, values in (("width", widths), ("height", heights), ("width / height", widths / heights)):
            lines.append(f"{name}: {_spread(values)}")
    if found.lengths:
        lines.append(f"captions: {len(found.lengths):,}; {unit}: {_spread(found.lengths)}")
    labels = [(label, count) for label, count in found.labels.most_common() if label is not None]
    if labels:
        more = f", and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
        lines.append(f"labels: {len(labels):,} different ones; {_counts(labels[:_SHOWN])}{more}")
    return lines


def _counts(counts: Sequence[tuple[object, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)


def _spread(values: Sequence[float] | np.ndarray) -> str:
    smallest, low, middle, high, largest = np.quantile(values, _QUANTILES)
    return f"median {middle:.4g}, 90% from {low:.4g} to {high:.4g}, all from {smallest:.4g} to {largest:.4g}"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def settings_of(found: Statistics, image_range: object) -> list[tuple[str, str, Any]]:
    """Return section, key and value of what a config should say."""
    mean, std = found.mean_and_std()
    settings: list[tuple[str, str, Any]] = [("model", "image_mean", mean), ("model", "image_std", std)]
    if found.dtype != "uint8":
        settings.insert(0, ("model", "image_dtype", found.dtype))
    if found.channels != 3:
        settings.insert(0, ("model", "channels", found.channels))
    return settings + ([] if image_range is None else [("data", "range", image_range)])


def _write_config(path: Path, given: dict[str, Any], settings: list[tuple[str, str, Any]]) -> None:
    for section, key, value in settings:
        given.setdefault(section, {})[key] = value
    parse(Config, given, f"--write {path}")
    write_whole(path, json.dumps(given, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote them into {path}")


def draw(found: Statistics, path: Path, unit: str) -> None:
    """Write histograms of levels, sizes, aspect ratios and lengths. Raises UserError if `path` cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (levels, sizes), (ratios, lengths) = figure.subplots(2, 2)
    names = {1: ["grey"], 3: ["red", "green", "blue"], 4: ["red", "green", "blue", "black"]}.get(found.channels)
    names = names or [f"C{channel % 10}" for channel in range(found.channels)]  # matplotlib's ten colours
    for name, fractions_256 in zip(names, found.fractions_C256 / found.images):
        levels.semilogy(fractions_256.numpy(), color=name)
    widths, heights = np.array(found.sizes).T
    sizes.hist([widths, heights], bins=40, label=["width", "height"])
    sizes.legend()
    ratios.hist(np.log2(widths / heights), bins=40)
    lengths.hist(found.lengths, bins=40)
    titles = ("fraction of each level", "pixels", "log2(width / height)", f"{unit} of captions")
    for axes, title in zip((levels, sizes, ratios, lengths), titles):
        axes.set_title(title)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
    print(f"drew {path}")


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
    """Look at `samples` samples of the corpus, drawn by `seed`. Captions are counted in tokens of the tokenizer, or in
    words; `labels` is a field of `read_labels`. Raises UserError if a shard or a label cannot be read."""
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
