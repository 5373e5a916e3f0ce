"""The trainer with a fault on one rank: run by test_faults.py.

main(["copy", "1", "MemoryError", ...]): in the first copy for a checkpoint, rank 1 raises MemoryError; the rest are
arguments of m3ae_fast.train.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from m3ae_fast import train
from m3ae_fast.data.dataset import Samples
from m3ae_fast.errors import UserError
from m3ae_fast.run import checkpoint, parts, run, run_log
from m3ae_fast.run.staging import Staging

# where a fault is -> the object and the name of what raises instead
PLACES: dict[str, tuple[Any, str]] = {
    "copy": (Staging, "_into_buffer"),
    "write": (parts, "save_file"),
    "table": (parts, "write_table"),
    "rename": (checkpoint, "put_in_place"),
    "pictures": (run, "draw_training"),
    "log": (run_log, "_forget_after"),
    "loader": (Samples, "__getitems__"),
}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "MemoryError": lambda: MemoryError("no room for the copy"),
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "KeyError": lambda: KeyError("a bug"),
    "EBADF": lambda: OSError(errno.EBADF, "Bad file descriptor"),
    "UserError": lambda: UserError("a.tar: a mistake"),
}


def main(argv: list[str]) -> int:
    place, rank, error, *arguments = argv
    if os.environ.get("RANK", "0") == rank:

        def injected_fault(*_: Any) -> None:
            raise ERRORS[error]()

        setattr(*PLACES[place], injected_fault)
    return train.main(arguments)
