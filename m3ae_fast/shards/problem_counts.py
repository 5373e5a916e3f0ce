"""Counts of invalid samples and of ignored files. A command reports them at its end."""

from __future__ import annotations

from collections import Counter

from m3ae_fast.data.reader import MAX_CAPTION_BYTES

_SHOWN = 3  # number of examples shown per kind
REFUSED, EMPTY, CUT, REDUCED = "refused", "empty", "cut", "reduced"
IGNORED, OUTSIDE, UNREAD = "ignored", "outside", "unread"
_TEXT = {
    REFUSED: "skipped sample{s} that cannot be used",
    EMPTY: "sample{s} with an empty caption",
    CUT: f"sample{{s}} with a caption of more than {MAX_CAPTION_BYTES:,} bytes, of which only the beginning is read",
    REDUCED: "image{s} with more than 8 bits per channel, reduced to 8 bits (all bits are kept only in .npy files)",
    IGNORED: "ignored file{s} (neither an image nor the caption of an image)",
    OUTSIDE: "skipped image{s} outside the folders of splits",
    UNREAD: "unused column{s}",
}


class Tally:
    """Counts of samples and files by kind of problem, with the first examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, sample: str) -> None:
        """Count a sample. `sample`: its name and a description of the problem."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, [])
        if len(self.examples[kind]) < _SHOWN:
            self.examples[kind].append(" ".join(sample.split())[:400])

    def add_caption(self, caption: str | None, sample: str) -> None:
        """Count a sample if its caption is blank or too long; None means that there is no caption."""
        size = len((caption or "").strip().encode("utf-8", "replace"))
        if caption is not None and not size:
            self.add(EMPTY, sample)
        elif size > MAX_CAPTION_BYTES:
            self.add(CUT, f"{sample}: {size:,} bytes")

    def merge(self, other: Tally) -> None:
        """Add the samples of another tally after the samples of this tally."""
        self.counts += other.counts
        for kind, samples in other.examples.items():
            self.examples[kind] = [*self.examples.get(kind, ()), *samples][:_SHOWN]

    def lines(self) -> list[str]:
        """Return one line for each kind that occurred, followed by its examples."""
        lines = []
        for kind, text in _TEXT.items():
            if self.counts[kind]:
                end = ", such as" if self.counts[kind] > _SHOWN else ":"
                lines.append(f"{self.counts[kind]:,} {text.format(s='s' * (self.counts[kind] != 1))}{end}")
                lines += [f"    {sample}" for sample in self.examples[kind]]
        return lines
