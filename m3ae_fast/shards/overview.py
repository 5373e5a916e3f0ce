"""Overview of a dataset before conversion: its splits, classes, captions and images as detected."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.progress import track
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.reader import Reader
from m3ae_fast.images.image_kind import Kind, kind_of
from m3ae_fast.shards.sources.interface import Records

_INSPECTED = 64  # number of samples that are inspected per split
_LARGEST, _SMALLEST = 4, 2  # if there are many classes, how many of the largest and of the smallest are shown
_KINDS = 3  # maximum number of kinds of images that are shown; see `describe_kind`
_EXAMPLE = 60  # maximum number of characters of an example caption
_NAMES = {1: "grey", 3: "colour"}


@dataclass
class Part:
    """A split with statistics of some of its samples."""

    name: str
    samples: int
    use: str
    classes: Counter[str] | None = None  # number of samples per class; None: unknown
    seen: int = 0
    kinds: list[Kind] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)  # number of unusable samples by reason

    def inspect(self, read: Callable[[int], tuple[bytes | None, str | None]], samples: int = _INSPECTED) -> Part:
        """Inspect `samples` evenly spaced samples and return this split. `read`: function that returns the image and
        caption of a sample, and may raise BadSample or OSError."""
        count = min(samples, self.samples)
        numbers = np.linspace(0, self.samples - 1, count).round().astype(np.int64).tolist()
        for number in track(numbers, f"inspecting {self.name}"):
            self.seen += 1
            try:
                image, caption = read(number)
                if caption is not None and caption.strip():
                    self.captions.append(" ".join(caption.split()))
                if image is not None:
                    self.kinds.append(kind_of(image))
            except (BadSample, OSError) as error:
                self.bad[str(error)] += 1
        return self


def parts_of(records: Records, uses: dict[str, str]) -> list[Part]:
    """Return each split of the records with statistics of some of its samples. `uses`: the purpose of each split, by
    name."""

    def part(split: str, samples: int) -> Part:
        def read(number: int) -> tuple[bytes | None, str | None]:
            record = records.read(split, number)
            return record.image, record.caption

        return Part(split, samples, uses.get(split, ""), records.class_counts(split)).inspect(read)

    return [part(split, samples) for split, samples in records.splits.items()]


def part_of(corpus: Corpus, name: str, use: str, classes: Counter[str] | None, samples: int = _INSPECTED) -> Part:
    """Return a dataset of shards as a split, with statistics of `samples` of its samples. `use`: the purpose of the
    split; `classes`: number of samples per class; None: unknown."""
    readers = [Reader(source, corpus.store) for source in corpus.sources]
    starts = np.cumsum([0, *(int(source.sizes.sum()) for source in corpus.sources)])

    def read(number: int) -> tuple[bytes | None, str | None]:
        source = int(np.searchsorted(starts, number, side="right")) - 1
        return readers[source].read(*readers[source].find(number - int(starts[source])))

    return Part(name, corpus.samples, use, classes).inspect(read, samples)


def show(title: str, parts: Sequence[Part]) -> None:
    """Print a table of the splits on stdout."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("split")
    table.add_column("samples", justify="right")
    for name in ("use", "classes", "captions", "images"):
        table.add_column(name)
    for part in parts:
        texts = (part.use, describe_classes(part.classes), _captions(part), _images(part))
        table.add_row(escape(part.name), f"{part.samples:,}", *map(escape, texts))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def describe_classes(classes: Counter[str] | None) -> str:
    """Return a description of the classes: their number, and the largest and smallest classes with their numbers of
    samples."""
    if not classes:
        return "-" if classes is None else "none"
    ordered = [f"{name} {count:,}" for name, count in sorted(classes.items(), key=lambda item: (-item[1], item[0]))]
    if len(ordered) > _LARGEST + _SMALLEST:
        ordered[_LARGEST:-_SMALLEST] = ["..."]
    return f"{len(classes):,}: {', '.join(ordered)}"


def _captions(part: Part) -> str:
    if not part.captions:
        return "none"
    example = part.captions[0]
    shown = example if len(example) <= _EXAMPLE else f"{example[: _EXAMPLE - 3]}..."
    share = "" if len(part.captions) == part.seen else f"in {len(part.captions):,} of {part.seen:,} inspected samples, "
    return f'{share}such as "{shown}"'


def _images(part: Part) -> str:
    """Return a description of the kinds and sizes of the inspected images."""
    if not part.kinds:
        return "none" if not part.bad else f"none can be read: {next(iter(part.bad))}"
    kinds = Counter(describe_kind(kind) for kind in part.kinds)
    shown = kinds.most_common(_KINDS)
    named = shown[0][0] if len(kinds) == 1 else ", ".join(f"{kind} ({count:,})" for kind, count in shown)
    named += ", ..." * (len(kinds) > _KINDS)
    sides = np.array([(kind.width, kind.height) for kind in part.kinds])
    low, high = (f"{width} x {height}" for width, height in (sides.min(0), sides.max(0)))
    bad = f"; {part.bad.total():,} of {part.seen:,} cannot be read" if part.bad else ""
    return f"{named}, {low if low == high else f'{low} to {high}'} px{bad}"


def describe_kind(kind: Kind) -> str:
    """Return a short description of an image's kind: its channels and, if it has more than 8 bits per channel, its bit
    depth."""
    channels = _NAMES.get(kind.channels, f"{kind.channels} bands")
    return channels if kind.depth is None else f"{channels}, {kind.depth}"
