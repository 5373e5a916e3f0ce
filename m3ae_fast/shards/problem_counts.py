"""Counts samples and files that are not as they should be; a tool reports them at its end."""

from __future__ import annotations

from collections import Counter

from m3ae_fast.data.reader import MAX_CAPTION_BYTES

_SHOWN = 3  # examples of each kind
REFUSED, EMPTY, CUT, IGNORED, OUTSIDE, UNREAD = "refused", "empty", "cut", "ignored", "outside", "unread"
_TEXT = {
    REFUSED: "unusable sample{s} skipped",
    EMPTY: "sample{s} with an empty caption",
    CUT: f"sample{{s}} with a caption of more than {MAX_CAPTION_BYTES:,} bytes, of which training reads the beginning",
    IGNORED: "file{s} ignored, as neither an image nor the caption of one",
    OUTSIDE: "image{s} in no split and left out",
    UNREAD: "unused column{s}",
}


class Tally:
    """Samples and files by kind: how many, and the first of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, sample: str) -> None:
        """Count a sample, `sample` being its name and what is wrong with it."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, [])
        if len(self.examples[kind]) < _SHOWN:
            self.examples[kind].append(" ".join(sample.split())[:400])

    def add_caption(self, caption: str | None, sample: str) -> None:
        """Count a sample whose caption is blank, or too long; None is no caption."""
        size = len((caption or "").strip().encode("utf-8", "replace"))
        if caption is not None and not size:
            self.add(EMPTY, sample)
        elif size > MAX_CAPTION_BYTES:
            self.add(CUT, f"{sample}: {size:,} bytes")

    def merge(self, other: Tally) -> None:
        """Add the samples of another tally, as if they came after this one's."""
        self.counts += other.counts
        for kind, samples in other.examples.items():
            self.examples[kind] = [*self.examples.get(kind, ()), *samples][:_SHOWN]

    def lines(self) -> list[str]:
        """Return a line for each kind that there is, followed by its examples."""
        lines = []
        for kind, text in _TEXT.items():
            if self.counts[kind]:
                lines.append(f"{self.counts[kind]:,} {text.format(s='s' * (self.counts[kind] != 1))}, such as")
                lines += [f"    {sample}" for sample in self.examples[kind]]
        return lines
