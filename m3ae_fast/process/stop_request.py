"""Stop requests: Ctrl-C, SIGTERM, SIGUSR1, a closed terminal and the end of the launcher each ask the run to save
and exit."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil

from m3ae_fast.base.errors import in_program
from m3ae_fast.base.signal_numbers import SIGNALS

_TICK_S = 0.25  # seconds between checks of the launcher
_GRACE_S = 3.0  # seconds for the main thread to clean up if there is nothing to save
# maximum seconds that a rank waits, after a stop request, until it has joined the other ranks and can notify them
_JOIN_S = 60.0
_ORPHAN_S = 10.0  # used instead of _JOIN_S if the launcher has ended, perhaps together with the rendezvous store
_LAUNCHER_GONE = "the launcher has ended"
BY_ANOTHER = "requested by another rank"
_GONE = (0,)
_TWICE_S = 2.0  # seconds after the first Ctrl-C during which another one is ignored, because launchers repeat it


class StopRequest:
    """Receiver of stop requests. `requested` becomes true at the first signal or when the launcher ends. A Ctrl-C
    more than `_TWICE_S` seconds after the first Ctrl-C ends the process at once.

    Before `listen` is called, there is no checkpoint to save, and a stop request ends a program of this package with
    exit code 0 at any point. If a user's own code calls functions of this package, KeyboardInterrupt is raised instead.
    Use it as a context manager in the main thread: in any other thread, it receives no signals, because Python allows
    only the main thread to handle them. The numbers of the signals are also written to a pipe. A separate thread reads
    them from it, because Python's handlers do not run while the main thread is inside a library.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._parents = launcher_chain()
        self._listening = self._leaving = self._ended = False
        self._first_interrupt = float("inf")
        self._notify: Callable[[str], bool] | None = None
        # printed if the run stops before `listen` is called; "": a message that nothing was to be saved
        self.advice = ""
        self._lock = threading.Lock()
        self._in_program, self._left = in_program(), threading.Event()
        self._joined = threading.Event()
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            self._joined.set()

    def __enter__(self) -> StopRequest:
        self._handles = threading.current_thread() is threading.main_thread()
        if not self._handles:
            return self
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        handled = [number for number in SIGNALS if not (number == signal.SIGHUP and _ignored(number))]
        self._handlers = {number: signal.signal(number, self._handle) for number in handled}
        self._old_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # programs block them while they import torch
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # from here on, the watcher must not interrupt the main thread any more
            self._listening = True
        self._left.set()
        if not self._handles:
            return
        signal.set_wakeup_fd(self._old_wake)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._leaving and self._in_program else handler)
        os.close(self._wake)  # ends the watcher
        if not self._leaving:
            self._watcher.join(_GRACE_S)

    @property
    def requested(self) -> bool:
        """Return whether a stop has been requested."""
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Request a stop. Only the reason of the first request is kept."""
        self.reason = self.reason or reason

    def joined(self, notify: Callable[[str], bool]) -> None:
        """Register a function that handles the stop requests that arrive before `listen` is called. It is called with
        the reason, forwards it to the other ranks, and returns whether this rank is the first one that is asked to
        stop."""
        self._notify = notify
        self._joined.set()

    def listen(self) -> None:
        """Let the run respond to stop requests from now on: it must check `requested`, save and exit."""
        self._listening = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._leaving:
            if self._ended:  # a second signal may be handled while the interpreter shuts down
                return
            self._ended = True
            raise SystemExit(0) if self._in_program else KeyboardInterrupt
        self.request(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._first_interrupt = min(self._first_interrupt, time.monotonic())
            if time.monotonic() - self._first_interrupt > _TWICE_S:
                raise KeyboardInterrupt

    def _watch(self) -> None:
        woken = select.poll()  # select() fails for file descriptors above 1023
        woken.register(self._wakes, select.POLLIN)
        while True:
            if woken.poll(1000 * _TICK_S):
                numbers = os.read(self._wakes, 64)
                if not numbers:
                    os.close(self._wakes)
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self.request(signal.Signals(number).name)
            if not self.requested and ((chain := launcher_chain()) != self._parents or chain == _GONE):
                self.request(_LAUNCHER_GONE)
            if self.requested and not self._listening:
                self._leave()

    def _leave(self) -> None:
        """End a process that has nothing to save, by an exception in the main thread or, if that fails, by force."""
        self._joined.wait(_ORPHAN_S if self.reason == _LAUNCHER_GONE else _JOIN_S)
        first = self.reason != BY_ANOTHER  # otherwise, the other rank prints the message
        if self._notify:
            with contextlib.suppress(Exception):  # the store ended with the process that hosted it
                first = self._notify(self.reason) and first
        with self._lock:
            if self._listening:  # training has begun or ended in the meantime
                return
            if first:
                before = f"({self.reason}); {self.advice}"
                message = before if self.advice else f"before the first step ({self.reason}); nothing to save"
                with contextlib.suppress(OSError):
                    os.write(2, f"stopped {message}\n".encode())
            self._leaving = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if self._in_program:
            time.sleep(_GRACE_S)
        elif self._left.wait(_GRACE_S):
            return
        kill_children()  # the commands of `pipe:` shards
        os._exit(0)


def _ignored(number: int) -> bool:
    """Return whether this process was started with the signal ignored, for example by nohup."""
    return signal.getsignal(number) == signal.SIG_IGN


def kill_children() -> None:
    """Kill all child processes. Call this function before this process exits without cleaning up."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def launcher_chain() -> tuple[int, ...] | None:
    """Return the ids of the launcher processes whose end should end this process. Under torchrun, this is its agent.
    Under deepspeed, both the inner and the outer launcher are returned, because the outer launcher ends without
    forwarding SIGTERM to the inner one. Return None under plain `python`, which may outlive its shell, and _GONE if a
    launcher started this process and has ended."""
    elastic, deepspeed = ("TORCHELASTIC_RUN_ID" in os.environ, "CROSS_SIZE" in os.environ)
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if elastic and "python" in os.path.basename(parent.exe()):  # not the init process that adopts orphans
            return (parent.pid,)
        if any("deepspeed.launcher.launch" in word for word in parent.cmdline()):
            return parent.pid, parent.ppid()
    return _GONE if elastic or deepspeed else None
