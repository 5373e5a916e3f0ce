"""Ctrl-C, SIGTERM and a vanished launcher ask the run to save and leave."""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil


class StopRequest:
    """`asked` turns true at the first SIGINT or SIGTERM after `listen`; a second SIGINT ends the process at once.

    Made early, since it must know the launcher before that can vanish; until `listen` a signal ends the process, which
    has nothing to save yet.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._parents = _launcher_chain()

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        # the deepspeed launcher repeats a terminal's Ctrl-C as SIGTERM: only a second Ctrl-C means "now"
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    @property
    def asked(self) -> bool:
        if not self.reason and self._parents and _launcher_chain() != self._parents:
            self.reason = "the launcher is gone"
        return bool(self.reason)


def _launcher_chain() -> tuple[int, ...] | None:
    """The processes whose end should end this one: none under plain `python`, which may outlive its shell; torchrun's
    agent; and deepspeed's inner and outer launcher, whose outer one passes no SIGTERM on when it dies."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (os.getppid(),)
    try:
        parent = psutil.Process(os.getppid())
        if any("deepspeed.launcher.launch" in word for word in parent.cmdline()):
            return parent.pid, parent.ppid()
    except psutil.Error:
        pass
    return None
