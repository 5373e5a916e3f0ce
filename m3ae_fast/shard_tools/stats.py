"""stats: what samples are like, and which settings that asks for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import MAX_CHANNELS, Config, SourceConfig, parse
from m3ae_fast.config.load import read_config
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.errors import UserError
from m3ae_fast.shard_tools.statistics import Statistics, collect, require_images
from m3ae_fast.whole_file import whole_file, write_whole

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
    """Write histograms of levels, sizes, aspect ratios and lengths. Raises UserError where `path` cannot be written."""
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
