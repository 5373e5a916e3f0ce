"""Counts invalid and unreadable samples, and stops the run if there are too many of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from m3ae_fast.base.errors import UserError

MIN_SEEN = 100  # number of samples that are read before the fraction of bad samples is checked
NAMED = 20  # number of bad samples that are logged one by one

_log = logging.getLogger(__name__)


class BadSample(Exception):
    """Raised for an invalid or unreadable sample; the message is the reason."""


class NeedsRange(BadSample):
    """Raised for an image with more than 8 bits per channel if the values of black and white are unknown."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"the image has {found}: set model.value_range to the values of black and white, such as [0, 4095] "
            '(--value-range 0,4095), or to "dtype"'
        )
        self.found = found


@dataclass(frozen=True)
class Skipped:
    """An invalid or unreadable sample, or an unreadable shard. For a shard, the key is "". For an image file outside of
    shards, `shard` is "" or the folder that is encoded."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{'/'.join(filter(None, (self.shard, self.key)))}: {self.reason}"


class BadSamples:
    """A counter that logs bad samples, and raises an error if there are too many of them."""

    def __init__(self, max_fraction: float, samples: int):
        """Create a counter that stops the run when more than `max_fraction` of the samples are bad. The check starts
        after MIN_SEEN samples, or after `samples`, the number of samples per epoch, if this is smaller."""
        self.max_fraction = max_fraction
        self.least = max(1, min(MIN_SEEN, samples))
        self.seen = self.bad = self._named = 0
        self._latest: Skipped | None = None

    @property
    def names_more(self) -> bool:
        """Return whether fewer than NAMED bad samples have been logged, so that `report` will log the next one."""
        return self._named < NAMED

    def report(self, skipped: Sequence[Skipped], log: bool = True) -> None:
        """Log bad samples by name. `log`: False if another process logs them; they then only count towards NAMED."""
        for item in skipped:
            self._latest = item
            self._named += 1
            if log and self._named <= NAMED:
                _log.warning("skipped %s", item)
            if log and self._named == NAMED:
                _log.warning("further bad samples are counted but no longer listed")

    def count(self, seen: int, bad: int) -> None:
        """Add the numbers of samples and of bad samples of a step, summed over all ranks; `seen` includes the bad ones.
        Raises UserError if more than `max_fraction` of all samples so far are bad."""
        self.seen += seen
        self.bad += bad
        if self.seen >= self.least:
            self._check()

    def finish(self) -> None:
        """Check the samples of a run that ends before enough samples were read for `count` to check them. Raises
        UserError if all of them are bad, unless `max_fraction` is 1."""
        if self.bad == self.seen:
            self._check()

    def _check(self) -> None:
        if self.bad > self.max_fraction * self.seen:
            example = f", for example {self._latest}" if self._latest else ""
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be used{example}; "
                f"repair the shards or raise data.max_bad_fraction ({self.max_fraction:g})"
            )
