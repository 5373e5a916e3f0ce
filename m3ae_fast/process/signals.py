"""Ctrl-C, SIGTERM, SIGUSR1, a closed terminal and a vanished launcher ask the run to save and exit."""

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

from m3ae_fast.base.stop_signals import SIGNALS

_TICK_S = 0.25  # between looks at the launcher
_GRACE_S = 3.0  # for the main thread to tidy up when there is nothing to save
_JOIN_S = 60.0  # given to a rank that is asked to stop before it has joined the others: it must notify them
_ORPHAN_S = 10.0  # the same where the launcher has gone, perhaps with the store in which ranks meet
_LAUNCHER_GONE = "the launcher is gone"
BY_ANOTHER = "asked by another rank"
_GONE = (0,)
_TWICE_S = 2.0  # a launcher repeats a terminal's Ctrl-C; only a later one means "now"


class StopRequest:
    """`asked` turns true at the first signal, or when the launcher is gone; a later Ctrl-C ends the process at once.

    Before `listen` there is nothing to save: the process ends by itself, with exit code 0, whatever it is doing. Use
    as a context manager, in the main thread. A separate thread reads the signals, since Python's handlers wait while
    the main thread is in a library.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._parents = _launcher_chain()
        self._listening = self._leaving = self._ended = self._reported = False
        self._first_interrupt = float("inf")
        self._tell: Callable[[str], bool] | None = None
        # saves what there is before `listen`, and returns what this rank says of it; "" if another rank does
        self.at_leaving: Callable[[], str] | None = None
        self._lock = threading.Lock()
        self._joined = threading.Event()
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            self._joined.set()

    def __enter__(self) -> StopRequest:
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        heeded = [number for number in SIGNALS if not (number == signal.SIGHUP and _ignored(number))]
        self._handlers = {number: signal.signal(number, self._handle) for number in heeded}
        self._old_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a program blocks them while it imports torch
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # from here on there is nothing to interrupt
            self._listening = True
        signal.set_wakeup_fd(self._old_wake)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._leaving else handler)
        os.close(self._wake)  # ends the watcher
        if not self._leaving:
            self._watcher.join(_GRACE_S)

    @property
    def asked(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def joined(self, tell: Callable[[str], bool]) -> None:
        """Pass on the reason by `tell`, from now until `listen`, if this rank is asked to stop; `tell` returns whether
        this rank is the first."""
        self._tell = tell
        self._joined.set()

    def listen(self) -> None:
        """Leave it to the run, from now on, to look at `asked` and save."""
        self._listening = True

    def leave(self, reason: str) -> None:
        """Save what there is before `listen`, in the main thread: another rank left first, and nothing can go on."""
        self.ask(reason)
        with self._lock:
            if not self._listening:
                self._report(first=False)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._leaving:
            if self._ended:  # two signals may be handled late, the second while the interpreter shuts down
                return
            self._ended = True
            raise SystemExit(0)
        self.ask(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._first_interrupt = min(self._first_interrupt, time.monotonic())
            if time.monotonic() - self._first_interrupt > _TWICE_S:
                raise KeyboardInterrupt

    def _watch(self) -> None:
        woken = select.poll()  # select() fails where a thousand files are open
        woken.register(self._wakes, select.POLLIN)
        while True:
            if woken.poll(1000 * _TICK_S):
                numbers = os.read(self._wakes, 64)
                if not numbers:
                    os.close(self._wakes)
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self.ask(signal.Signals(number).name)
            if not self.asked and ((chain := _launcher_chain()) != self._parents or chain == _GONE):
                self.ask(_LAUNCHER_GONE)
            if self.asked and not self._listening:
                self._leave()

    def _leave(self) -> None:
        """End a process that has nothing to save: by an exception in the main thread, or else at once."""
        self._joined.wait(_ORPHAN_S if self.reason == _LAUNCHER_GONE else _JOIN_S)
        first = True
        if self._tell:
            with contextlib.suppress(Exception):  # the store has gone with the process that held it
                first = self._tell(self.reason)
        with self._lock:
            if self._listening:  # meanwhile it has begun to train, or ended
                return
            self._report(first)
            self._leaving = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(_GRACE_S)
        kill_children()  # the commands of `pipe:` shards
        os._exit(0)

    def _report(self, first: bool) -> None:
        """Save what there is and say it, once. Of nothing that is saved only the rank speaks that asked `first`."""
        if self._reported:
            return
        self._reported = True
        if self.at_leaving is None:
            said = f"before the first step ({self.reason}); nothing to save" if first else ""
        else:
            said = self._saved(self.at_leaving)
        if said:
            with contextlib.suppress(OSError):
                os.write(2, f"stopped {said}\n".encode())

    def _saved(self, save: Callable[[], str]) -> str:
        """Save what there is, and return what to say of a process that leaves."""
        try:
            said = save()
            return f"({self.reason}); {said}" if said else ""
        except Exception as error:  # this thread must live on to end the process
            return f"({self.reason}); what was found so far is lost: {error}"


def _ignored(number: int) -> bool:
    """Return whether whoever started this process wants the signal to be ignored, as nohup does."""
    return signal.getsignal(number) == signal.SIG_IGN


def kill_children() -> None:
    """Kill all child processes: needed where this process exits without cleaning up."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _launcher_chain() -> tuple[int, ...] | None:
    """Return the processes whose end should end this one: none under plain `python`, which may outlive its shell;
    torchrun's agent; and deepspeed's inner and outer launcher, since the outer one forwards no SIGTERM when it dies.
    _GONE if a launcher started this process and is no more."""
    elastic, deepspeed = ("TORCHELASTIC_RUN_ID" in os.environ, "CROSS_SIZE" in os.environ)
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if elastic and "python" in os.path.basename(parent.exe()):  # not the init that takes in orphans
            return (parent.pid,)
        if any("deepspeed.launcher.launch" in word for word in parent.cmdline()):
            return parent.pid, parent.ppid()
    return _GONE if elastic or deepspeed else None
