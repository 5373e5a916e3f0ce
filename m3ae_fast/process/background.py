"""Background work during training: one piece at a time, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from m3ae_fast.errors import UserError


class Background:
    """A thread for one piece of work at a time. As a context manager it waits for the last one at the end."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.leaving = threading.Event()  # set where an error ends this rank that other ranks may not share

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; the one before must have been waited for."""
        assert self._thread is None
        # a daemon: a process that must exit at once does not wait for it
        thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)
        thread.start()  # or there is no room for its stack
        self._thread = thread

    def failed(self) -> bool:
        """Return whether the work has ended with an error, which `wait` raises."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the work under way, if any, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.wait()
            return
        if not issubclass(kind, UserError):
            self.leaving.set()
        if issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()  # what it saves is worth waiting for; the error that ends the run is the one to report
