"""Copies a checkpoint's tensors to the host while the next step computes its gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast.engine.fragments import Fragment, Fragments


class Staging:
    """A host buffer for background copies of a rank's part of the training state. The optimiser must call `wait` before
    it changes the state.

    The forward and backward passes only read the state, so a step waits only if the copy takes longer than these
    passes.
    """

    def __init__(self) -> None:
        # reused for every copy, because allocating a buffer takes longer than the copy
        self._buffer: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, device: torch.device) -> None:
        """Announce a copy of a state on this device, so that `wait` blocks until it is complete. Call it from the
        training thread."""
        if device.type == "cuda":
            # created here, because other threads may have another current device
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())  # wait for the previous update
        self._copied.clear()

    def copy(self, fragments: Callable[[], Fragments]) -> Fragments:
        """Return a copy of the result of `fragments` on the host. It is valid until the next copy. Can be called in any
        thread. Training calls it in a background thread, because listing the pieces of a state takes longer than a
        step should wait."""
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
        """Wait until the copy that `begin` announced is complete."""
        self._copied.wait()

    def _into_buffer(self, part: Fragments) -> Fragments:
        count = sum(len(piece.data) for piece in part.values())
        if self._buffer is None or len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.float32)
            if self._stream is not None:
                self._buffer = self._buffer.pin_memory()  # without pinning, each piece would be copied synchronously
        staged, at = {}, 0
        for name, (data, start, shape) in part.items():
            copy = self._buffer[at : (at := at + len(data))]
            staged[name] = Fragment(copy.copy_(data, non_blocking=True), start, shape)
        return staged
