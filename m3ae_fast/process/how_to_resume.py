"""The advice in messages on resuming a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_WAYS = ["--resume auto"]  # the last element is in use


def how_to_resume() -> str:
    """Return what continues a run that has ended early, as the subject of a sentence."""
    return _WAYS[-1]


@contextmanager
def resumed_by(way: str) -> Iterator[None]:
    """Enter a context in which `how_to_resume` returns `way`, in all threads."""
    _WAYS.append(way)
    try:
        yield
    finally:
        _WAYS.pop()
