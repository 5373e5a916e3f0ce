"""Threads that cannot keep pytest from exiting after a failure, because they are daemons."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

LIMIT_S = 60.0


def start(work: Callable[..., Any], *arguments: Any) -> Future:
    """Return the result of `work(*arguments)`, which is computed in a thread of its own, as a future."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def map_threads(work: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Return the results of `map(work, *arguments)`, each computed in a thread of its own. Raises the first exception,
    or TimeoutError if a thread takes longer than LIMIT_S seconds."""
    return [future.result(LIMIT_S) for future in [start(work, *each) for each in zip(*arguments)]]
