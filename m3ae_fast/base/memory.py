"""Recognises out-of-memory errors of all libraries. Imports only standard modules, because torch may not fit into
memory."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

# messages of torch, CUDA, C++ and the system
_SIGNS = ("can't allocate memory", "annot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")
# further messages if there is a limit of `ulimit -v`, which may prevent a library, a module or the stack of a
# thread from being mapped
_SIGNS_OF_LIMIT = (
    "start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
    "error return without",
)

# bytes of address space that torch and its threads require; with less, they abort or hang without an error
_ADDRESSES = 1_500_000_000


def refuse_too_few_addresses() -> None:
    """Raise SystemExit, with one line on stderr, if `ulimit -v` allows less address space than torch itself
    requires."""
    limit = _limit()
    if limit is not None and limit < _ADDRESSES:
        reason = f"importing torch alone needs {_ADDRESSES / 1e9:.2g} GB of address space"
        print(f"error: not enough memory ({reason}){limit_note()}", file=sys.stderr)
        raise SystemExit(2)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that the memory of the GPU or of the machine is exhausted, or that the limit
    of `ulimit -v` has been reached."""
    signs = _SIGNS + (_SIGNS_OF_LIMIT if _limit() is not None else ())
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def limit_note() -> str:
    """Return a note about the limit on this process's address space; "" if there is none."""
    limit = _limit()
    return (
        ""
        if limit is None
        else f"; ulimit -v limits the address space of this process to {limit / 1e9:.2g} GB: raise this limit first"
    )


def shown_in_one_line(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an out-of-memory error on one line. Serves as sys.excepthook until a program's `main` runs, because even
    importing torch may run out of memory."""
    if not out_of_memory(error):
        return sys.__excepthook__(kind, error, where)
    print(f"error: {no_memory(error)}", file=sys.stderr)
    raise SystemExit(2)


def no_memory(error: BaseException) -> str:
    """Return the one-line message for an out-of-memory error."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"not enough memory ({reason}){limit_note() or '; close other programs, or process less data at a time'}"


def _limit() -> int | None:
    """Return the limit on this process's address space in bytes; None if it is not limited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
