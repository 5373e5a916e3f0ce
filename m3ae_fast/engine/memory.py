"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones. By default it hands large blocks back to the kernel at once,
    and a step on the CPU then waits for 100,000 fresh pages. Does nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
