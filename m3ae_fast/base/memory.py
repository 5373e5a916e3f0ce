"""Errors that say that there is no memory left, whichever library meets them. Imports nothing: torch may not fit."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

# what torch, CUDA, C++ and the system say
_SIGNS = ("can't allocate memory", "annot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")
# what else they say under `ulimit -v`: of threads that find no room for a stack, of libraries and of modules
_SIGNS_OF_LIMIT = (
    "start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
    "error return without",
)

_ADDRESSES = 1_500_000_000  # bytes that torch and its threads take; with less they abort or hang instead of raising


def refuse_too_few_addresses() -> None:
    """Raise SystemExit, with one line on stderr, where `ulimit -v` leaves a program less than torch itself takes."""
    limit = _limit()
    if limit is not None and limit < _ADDRESSES:
        reason = f"importing torch alone needs {_ADDRESSES / 1e9:.2g} GB of address space"
        print(f"error: not enough memory ({reason}){limit_note()}", file=sys.stderr)
        raise SystemExit(2)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the GPU, this machine or what `ulimit -v` allows has no memory left."""
    signs = _SIGNS + (_SIGNS_OF_LIMIT if _limit() is not None else ())
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def limit_note() -> str:
    """Return what to say of a limit on this process's addresses, "" if there is none."""
    limit = _limit()
    return (
        "" if limit is None else f"; ulimit -v allows this process {limit / 1e9:.2g} GB of addresses: raise that first"
    )


def shown_in_one_line(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Serve as sys.excepthook for a program until its `main` runs: torch itself may find no memory to be imported."""
    if not out_of_memory(error):
        return sys.__excepthook__(kind, error, where)
    print(f"error: {no_memory(error)}", file=sys.stderr)
    raise SystemExit(2)


def no_memory(error: BaseException) -> str:
    """Return the line for a user whose program ended for lack of memory."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"not enough memory ({reason}){limit_note() or '; end other programs, or ask for less at a time'}"


def _limit() -> int | None:
    """Return how many bytes of addresses this process may have, None if it is not limited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
