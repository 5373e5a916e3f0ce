"""Work in batches that all ranks leave together when one of them is asked to stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.signals import StopRequest

T = TypeVar("T")


class Stopped(Exception):
    """Raised on all ranks at the same batch."""


def until_stopped(batches: Iterable[T], ranks: Ranks, stop: StopRequest) -> Iterator[T]:
    """Yield batches, of which ranks have equally many. Raises Stopped before one if a rank is asked to stop."""
    for batch in batches:
        if any(ranks.sum([stop.asked])):
            raise Stopped
        yield batch
