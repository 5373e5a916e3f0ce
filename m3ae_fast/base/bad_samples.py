"""Keeps account of samples that cannot be used, and stops the run when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from m3ae_fast.base.errors import UserError

MIN_SEEN = 100  # samples before a fraction of bad ones means anything
NAMED = 20  # bad samples that are named one by one

_log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be used, and why."""


class NeedsRange(BadSample):
    """Values of more than 8 bits, of which nothing says what is black and white."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"has {found}: set data.range to the values of black and white, such as [0, 4095] (--range 0,4095), or to "
            '"dtype"'
        )
        self.found = found


@dataclass(frozen=True)
class Skipped:
    """A sample, or a whole shard (key ""), that cannot be used."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{'/' if self.key else ''}{self.key}: {self.reason}"


class BadSamples:
    """Counts samples that could not be used, names them in the log, and stops a run that has too many."""

    def __init__(self, max_fraction: float, samples: int):
        """Stop when more than `max_fraction` of the samples are bad. The check starts after MIN_SEEN samples, or after
        one epoch (`samples`) if that is fewer."""
        self.max_fraction = max_fraction
        self.least = max(1, min(MIN_SEEN, samples))
        self.seen = self.bad = self._named = 0
        self._latest: Skipped | None = None

    @property
    def names_more(self) -> bool:
        """Return whether `report` would log another one."""
        return self._named < NAMED

    def report(self, skipped: Sequence[Skipped], say: bool = True) -> None:
        """Log bad samples by name, or, without `say`, only remember that another process does."""
        for item in skipped:
            self._latest = item
            self._named += 1
            if say and self._named <= NAMED:
                _log.warning("skipped %s", item)
            if say and self._named == NAMED:
                _log.warning("further bad samples are counted but no longer listed")

    def count(self, seen: int, bad: int) -> None:
        """Add the counts of a step over all ranks; `seen` includes the bad ones. Raises UserError if more than
        `max_fraction` of all samples so far are bad."""
        self.seen += seen
        self.bad += bad
        if self.seen >= self.least and self.bad > self.max_fraction * self.seen:
            example = f", such as {self._latest}" if self._latest else ""
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be used{example}; "
                f"repair the shards or raise data.max_bad_fraction ({self.max_fraction:g})"
            )
