"""Background tasks during training. They run one at a time, and `wait` raises their errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType

from m3ae_fast.base.errors import UserError

_BRIEFLY_S = 0.25


class Background:
    """A background thread that runs one task at a time. As a context manager, it waits for the last task at the end.

    The thread is started in advance: on busy cores, starting it takes milliseconds that would delay a step.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        # set if this rank exits because of an error, which may not have occurred on the other ranks
        self.leaving = threading.Event()
        # a daemon thread, so that a process that must exit at once does not wait for it
        threading.Thread(target=self._serve, name="background", daemon=True).start()

    def start(self, work: Callable[[], None]) -> None:
        """Start `work`. `wait` must have returned for the previous task."""
        assert not self.busy and self._error is None
        self._idle.clear()
        self._given.put(work)

    def failed(self) -> bool:
        """Return whether the task has ended with an error; `wait` raises it."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Return whether a task has been started and has not ended."""
        return not self._idle.is_set()

    def wait_briefly(self) -> None:
        """Wait for the current task, but for at most a fraction of a second."""
        self._idle.wait(_BRIEFLY_S)

    def wait(self) -> None:
        """Wait for the current task, if any, and raise its error."""
        self._idle.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _serve(self) -> None:
        while work := self._given.get():
            try:
                work()
            except BaseException as error:  # a panic in a Rust library is not an Exception
                self._error = error
            finally:
                del work  # the function may refer to large objects
                self._idle.set()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._given.put(None)
        if kind is None:
            self.wait()
            return
        if not issubclass(kind, UserError):
            self.leaving.set()
        if issubclass(kind, Exception):
            # wait for the task, but drop its error in favour of the error that ends the run
            self._idle.wait()
