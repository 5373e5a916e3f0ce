"""The advice in messages on resuming a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_FROM_CHECKPOINT = "continues from the last checkpoint"
AGAIN = "running the same command again"
_WAYS = [("--resume auto", _FROM_CHECKPOINT)]  # ways to resume, each with its effect; the last element is in use


def how_to_resume() -> str:
    """Return the option or command that continues a run that has ended early, such as "--resume auto". Messages use it
    as the subject of a sentence."""
    return _WAYS[-1][0]


def effect_of_resuming() -> str:
    """Return a clause that states how to resume a run that has ended early, and what then happens."""
    return " ".join(_WAYS[-1])


@contextmanager
def resumed_by(way: str, effect: str = _FROM_CHECKPOINT) -> Iterator[None]:
    """Enter a context in which `how_to_resume` returns `way`, in all threads. `effect`: what this way does, as the
    predicate of a sentence, such as "starts over"."""
    _WAYS.append((way, effect))
    try:
        yield
    finally:
        _WAYS.pop()
