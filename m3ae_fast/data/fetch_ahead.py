"""Fetches shards before they are read, in the background."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from m3ae_fast.data.shards import ShardStore

FETCHING = "fetch shards ahead"  # the thread's name


class FetchAhead:
    """Fetches one shard after the other, in a thread that ends when there is none left.

    It is one for each process: lanes that begin a window at the same time do not open a connection each.
    """

    def __init__(self, store: ShardStore):
        self.store = store
        self._waiting: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def add(self, shards: Iterable[str]) -> None:
        """Fetch `shards` after those that were added before."""
        self._waiting.extend(shards)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch, name=FETCHING, daemon=True)
            self._thread.start()

    def _fetch(self) -> None:
        while self._waiting:
            self.store.fetch_ahead([self._waiting.popleft()])

    def __reduce__(self):
        return FetchAhead, (self.store,)  # threads are not pickled
