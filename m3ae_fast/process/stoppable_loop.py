"""Loops over batches. If one rank is asked to stop, all ranks leave the loop before the same batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.stop_request import StopRequest

T = TypeVar("T")


class Stopped(Exception):
    """Raised on all ranks at the same batch after a stop request."""


def until_stopped(batches: Iterable[T], ranks: Ranks, stop: StopRequest) -> Iterator[T]:
    """Yield the batches. All ranks must have the same number of batches. Raises Stopped before the next batch if a rank
    is asked to stop."""
    for batch in batches:
        if any(ranks.sum([stop.requested])):
            raise Stopped
        yield batch
