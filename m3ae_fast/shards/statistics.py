"""Statistics of samples (pixels, sizes, captions, formats, labels) and the settings derived from them.

Shapes: C channels.
"""

from __future__ import annotations

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

from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.batch.tokenizer import CaptionTokenizer, load_tokenizer
from m3ae_fast.config import Config, Range, SourceConfig, parse
from m3ae_fast.config.arguments import accepts
from m3ae_fast.config.load import read_config
from m3ae_fast.data.corpus import Corpus, open_corpus
from m3ae_fast.data.labels import LEFT_OUT, Label, read_labels, select_labelled
from m3ae_fast.data.order import permutation
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.images.decoding import decode_image, format_of
from m3ae_fast.images.image_kind import kind_of
from m3ae_fast.shards.options import StatsOptions

_QUANTILES = (0, 0.05, 0.5, 0.95, 1)  # quantiles that are shown of each distribution
SMALLEST_STD = 1e-4  # minimum standard deviation of a channel
_SAMPLES = 10_000  # maximum number of samples that `stats` inspects
_LONGEST = 1 << 16  # maximum length of a caption in tokens
_SHOWN = 5  # maximum numbers of labels and of reasons for unreadable samples that are shown


@accepts(StatsOptions)
def stats(shards: str | Sequence[str], **options: Any) -> Statistics:
    """Return statistics of at most 10,000 random samples of shards; `settings_of` derives the settings of a config from
    them.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        options: the options of the command, such as `channels=13`: the fields of `options.StatsOptions`.

    Raises:
        UserError: an argument is invalid, a shard, a label or the config cannot be read, or a file cannot be written.
    """
    given = StatsOptions(shards=shards, **options)
    config = None if given.write is None else _read_whole_config(given.write)
    loaded = None if given.tokenizer is None else load_tokenizer(given.tokenizer, _LONGEST, label="--tokenizer")
    corpus = open_corpus([SourceConfig(shards=list(given.shards))], ShardStore(given.cache_dir), progress=True)
    found = collect(corpus, _SAMPLES, 0, given.channels, given.value_range, loaded, given.labels, given.dtype)
    if given.out is not None:
        draw_statistics(given.out, found)
    if given.write is not None and config is not None:
        _write_settings(given.write, config, settings_of(found))
    return found


def describe_statistics(found: Statistics) -> list[str]:
    """Return the lines that describe statistics to the user."""
    lines = [f"{found.seen:,} of {found.of:,} samples inspected"]
    if found.bad:
        fraction = found.bad.total() / found.seen
        lines.append(f"cannot be read: {found.bad.total():,} ({fraction:.2%}; see data.max_bad_fraction)")
        lines += [f"  {count:,}: {reason}" for reason, count in found.bad.most_common(_SHOWN)]
    if found.images:
        mean, std = found.mean_and_std()
        widths, heights = np.array(found.sizes).T
        lines.append(f"images: {found.images:,} ({_counts(found.formats.most_common())})")
        lines.append(f"mean {_compact(mean)}  std {_compact(std)} (black is 0 and white is 1)")
        for name, values in (("width", widths), ("height", heights), ("width / height", widths / heights)):
            lines.append(f"{name}: {_spread(values)}")
    if found.lengths:
        lines.append(f"captions: {len(found.lengths):,}; {found.unit}: {_spread(found.lengths)}")
    labels = [(label, count) for label, count in found.labels.most_common() if label is not None]
    if labels:
        more = f", and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
        lines.append(f"different labels: {len(labels):,} ({_counts(labels[:_SHOWN])}{more})")
    return lines


def _counts(counts: Sequence[tuple[object, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)


def _spread(values: Sequence[float] | np.ndarray) -> str:
    smallest, low, middle, high, largest = np.quantile(values, _QUANTILES)
    return f"median {middle:.4g}, 90% from {low:.4g} to {high:.4g}, all from {smallest:.4g} to {largest:.4g}"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def settings_of(found: Statistics) -> list[tuple[str, str, Any]]:
    """Return the settings derived from statistics, each as section, key and value. Raises UserError if no image could
    be read."""
    require_images(found)
    mean, std = found.mean_and_std()
    settings: list[tuple[str, str, Any]] = [("model", "image_mean", mean), ("model", "image_std", std)]
    if found.dtype != "uint8":
        settings.insert(0, ("model", "image_dtype", found.dtype))
    if found.channels != 3:
        settings.insert(0, ("model", "channels", found.channels))
    return settings + ([] if found.value_range is None else [("model", "value_range", found.value_range)])


def options_of(settings: Sequence[tuple[str, str, Any]]) -> list[str]:
    """Return the command-line options that apply the settings returned by `settings_of`."""
    return [f"--set {section}.{key}={_compact(value)}" for section, key, value in settings]


def _read_whole_config(path: Path) -> dict[str, Any]:
    """Return the config in the file `path`, for `_write_settings`. Raises UserError if it is invalid."""
    given = read_config(path, "--write")
    parse(Config, given, f"--write {path}")
    return given


def _write_settings(path: Path, given: dict[str, Any], settings: Sequence[tuple[str, str, Any]]) -> None:
    """Write the config `given` with the settings of `settings_of`. Raises UserError if the result is invalid, or if
    `path` cannot be written."""
    for section, key, value in settings:
        given.setdefault(section, {})[key] = value
    parse(Config, given, f"--write {path}")
    write_text_atomically(path, json.dumps(given, indent=2, ensure_ascii=False) + "\n")


def draw_statistics(path: Path, found: Statistics) -> None:
    """Write a PNG with histograms of pixel values, image sizes, aspect ratios and caption lengths. Raises UserError if
    no image could be read, or if `path` cannot be written."""
    from matplotlib.figure import Figure

    require_images(found)
    figure = Figure(figsize=(12, 8), layout="constrained")
    (levels, sizes), (ratios, lengths) = figure.subplots(2, 2)
    names = {1: ["grey"], 3: ["red", "green", "blue"], 4: ["red", "green", "blue", "grey"]}.get(found.channels)
    names = names or [f"C{channel % 10}" for channel in range(found.channels)]  # the ten default colours of Matplotlib
    for number, (name, fractions_256) in enumerate(zip(names, found.fractions_C256 / found.images)):
        label = f"channel {number}" if found.channels not in (1, 3) else name
        levels.semilogy(fractions_256.numpy(), color=name, label=label)
    if found.channels <= 10:
        levels.legend()
    widths, heights = np.array(found.sizes).T
    sizes.hist([widths, heights], bins=40, label=["width", "height"])
    sizes.legend()
    ratios.hist(np.log2(widths / heights), bins=40)
    lengths.hist(found.lengths, bins=40)
    names_of_axes = (
        ("Pixel values by channel", "pixel value (0 to 255)", "fraction of pixels (logarithmic)"),
        ("Image sizes", "width or height (pixels)", "number of images"),
        ("Aspect ratios", "log2(width / height)", "number of images"),
        ("Lengths of captions", f"length ({found.unit})", "number of captions"),
    )
    for axes, (title, x, y) in zip((levels, sizes, ratios, lengths), names_of_axes):
        axes.set(title=title, xlabel=x, ylabel=y)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


@dataclass
class Statistics:
    """Sums and counts over the inspected samples."""

    of: int  # total number of samples in the dataset
    channels: int
    dtype: str = "uint8"  # value of `model.image_dtype`
    value_range: Range | None = None  # value of `model.value_range`
    unit: str = "words"  # unit of the caption lengths
    seen: int = 0
    images: int = 0
    # float64, sums over the images: frequencies of the 256 levels; means of the pixels and of their squares
    fractions_C256: Tensor = field(init=False)
    moments_2C: Tensor = field(init=False)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height in pixels
    lengths: list[int] = field(default_factory=list)  # caption lengths
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[Label | None] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)  # number of unreadable samples by reason
    unread: bytes | None = None  # the first image that cannot be read

    def __post_init__(self) -> None:
        self.fractions_C256 = torch.zeros(self.channels, 256, dtype=torch.float64)
        self.moments_2C = torch.zeros(2, self.channels, dtype=torch.float64)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return `model.image_mean` and `image_std`, in units in which black is 0 and white is 1, rounded to four
        decimals. A standard deviation below SMALLEST_STD is replaced by SMALLEST_STD."""
        mean_C, square_C = self.moments_2C / max(1, self.images)
        std_C = (square_C - mean_C**2).clamp_min(0).sqrt()
        return [round(x, 4) for x in mean_C.tolist()], [round(max(x, SMALLEST_STD), 4) for x in std_C.tolist()]

    def add(self, image: Tensor) -> None:
        """Count an image, uint8, uint16 or float32 [C, H, W] as returned by `decode_image`."""
        self.images += 1
        self.sizes.append((image.shape[2], image.shape[1]))
        unit_CN = (image.double() / LARGEST.get(image.dtype, 1)).flatten(1)
        self.moments_2C += torch.stack((unit_CN.mean(1), unit_CN.square().mean(1)))
        levels_CN = (255 * unit_CN.clamp(0, 1)).round().long()
        for fractions_256, levels_N in zip(self.fractions_C256, levels_CN):
            fractions_256 += torch.bincount(levels_N, minlength=256) / len(levels_N)


def sample(corpus: Corpus, samples: int, seed: int) -> Corpus:
    """Return a dataset of `samples` random samples (all samples if there are fewer), in file order. The choice depends
    only on `seed`."""
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
    value_range: Range | None,
    tokenizer: CaptionTokenizer | None,
    labels: str | None,
    dtype: str = "uint8",
) -> Statistics:
    """Return statistics of `samples` random samples of the dataset; `seed` determines the choice. Caption lengths are
    counted in tokens of the tokenizer or, without a tokenizer, in words. `labels`: as `field` of `read_labels`; None:
    labels are not read. Raises UserError if a shard or a label cannot be read."""
    found = Statistics(corpus.samples, channels, dtype, value_range, "tokens" if tokenizer else "words")
    drawn = sample(corpus, samples, seed)
    for of_source in read_labels(drawn, labels) if labels else ():
        found.labels.update(of_source)
    places = [(source, number) for source in drawn.sources for number in range(sum(source.sizes))]
    readers: dict[int, Reader] = {}
    for source, number in track(places, "inspecting samples", len(places)):
        reader = readers.setdefault(id(source), Reader(source, corpus.store))
        data = None
        try:
            data, caption = reader.read(*reader.find(number))
            if caption is not None:
                found.lengths.append(len(tokenizer.encode(caption)) if tokenizer else len(caption.split()))
            if data is not None:
                found.add(decode_image(data, channels, value_range, dtype))
                found.formats[format_of(data)] += 1
        except (BadSample, OSError) as error:
            found.bad[str(error)] += 1
            found.unread = found.unread or data
        found.seen += 1
    return found


def require_images(found: Statistics) -> None:
    """Raise UserError if no image could be read."""
    if not found.images:
        reason = f"; first error: {next(iter(found.bad))}" if found.bad else ""
        raise UserError(f"none of {found.seen:,} samples has an image that can be read{reason}{_advice(found)}")


def _advice(found: Statistics) -> str:
    """Return a suggestion of options with which the first unreadable image could be read; "" if there are none."""
    try:
        kind = kind_of(found.unread or b"")
    except BadSample:
        return ""
    if not kind.is_array or (kind.channels, kind.dtype) == (found.channels, found.dtype):
        return ""
    black_and_white = " --value-range BLACK,WHITE" if kind.depth else ""
    return f"; try --channels {kind.channels} --dtype {kind.dtype}{black_and_white}"
