"""Stages that heed a request to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m3ae_fast.pretraining import GOES_ON
from m3ae_fast.process.program import Session, joined_program


@contextmanager
def stage() -> Iterator[Session]:
    """Run a program as a stage of a longer line, as `joined_program` does; `stop.asked` says afterwards whether
    somebody has asked to stop, even where the stage has come to its end."""
    with joined_program() as session:
        session.stop.at_leaving = lambda: GOES_ON
        yield session
