"""The trainer, `embed` or `evaluate`, with a fault on one rank: run by test_faults.py.

With main(["copy", "1", "MemoryError", ...]), rank 1 raises MemoryError in the first copy for a checkpoint. Further
arguments are those of m3ae_fast.train or, for the places "embed" and "evaluate", of these commands.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import state_files, writing
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.cli import embed, evaluate
from m3ae_fast.data.dataset import Samples
from m3ae_fast.embedding import features
from m3ae_fast.evaluation import task_features
from m3ae_fast.training import metrics_log, pretraining_task


def kill() -> BaseException:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hang() -> BaseException:
    print("hanging", flush=True)
    time.sleep(600)
    raise AssertionError


# For each place of the fault, the function that is replaced by one that raises an error: (object, its attribute).
PLACES: dict[str, tuple[Any, str]] = {
    "copy": (Staging, "_into_buffer"),
    "write": (state_files, "save_file"),
    "table": (state_files, "write_table"),
    "rename": (writing, "put_in_place"),
    "pictures": (pretraining_task, "draw_training"),
    "log": (metrics_log, "_forget_after"),
    "loader": (Samples, "__getitems__"),
    "embed": (features, "encode_types"),
    "evaluate": (task_features, "encode_types"),
}
PROGRAMS = {"embed": embed, "evaluate": evaluate}  # program by place of the fault; all other places are in the trainer
ERRORS: dict[str, Callable[[], BaseException]] = {
    "MemoryError": lambda: MemoryError("no room for the copy"),
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "KeyError": lambda: KeyError("a bug"),
    "EBADF": lambda: OSError(errno.EBADF, "Bad file descriptor"),
    "UserError": lambda: UserError("a.tar: a mistake"),
    "SIGKILL": kill,
    "hang": hang,
}


def main(argv: list[str]) -> int:
    place, rank, error, *arguments = argv
    if os.environ.get("RANK", "0") == rank:

        def injected_fault(*_: Any, **__: Any) -> None:
            raise ERRORS[error]()

        assert hasattr(*PLACES[place])
        setattr(*PLACES[place], injected_fault)
    return PROGRAMS.get(place, train).main(arguments)
