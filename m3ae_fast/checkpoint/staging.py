"""The copy of a checkpoint's tensors on the host, made while the next step computes its gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast.engine.fragments import Fragment, Fragments


class Staging:
    """Copies a rank's part of the training state in the background. The optimiser must call `wait` before it changes
    the state.

    Forward and backward only read what is copied, so a step waits no longer than the copy takes beyond them.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # kept: a fresh one costs more than the copying
        self._stream: torch.cuda.Stream | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, device: torch.device) -> None:
        """Announce a copy of a state on this device, so that `wait` blocks until it is complete. Call it from the
        training thread."""
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream()  # here: another thread has another current device
            self._stream.wait_stream(torch.cuda.current_stream())  # for the update before
        self._copied.clear()

    def copy(self, fragments: Callable[[], Fragments]) -> Fragments:
        """Return a copy of what `fragments` returns, on the host, which stays until the next one. In any thread: to
        list the pieces of a state takes longer than a step should wait."""
        try:
            if self._stream is None:
                return self._into_buffer(fragments())
            with torch.cuda.stream(self._stream):
                staged = self._into_buffer(fragments())
            self._stream.synchronize()
            return staged
        finally:
            self._copied.set()

    def wait(self) -> None:
        """Wait until what was begun has been copied."""
        self._copied.wait()

    def _into_buffer(self, part: Fragments) -> Fragments:
        count = sum(len(piece.data) for piece in part.values())
        if self._buffer is None or len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.float32)
            if self._stream is not None:
                self._buffer = self._buffer.pin_memory()  # or each piece is waited for by itself
        staged, at = {}, 0
        for name, (data, start, shape) in part.items():
            copy = self._buffer[at : (at := at + len(data))]
            staged[name] = Fragment(copy.copy_(data, non_blocking=True), start, shape)
        return staged
