"""Environment variables that libraries read when they are imported, or first used."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def settle_libraries() -> None:
    """Set default environment variables for torch, without overriding those set by the user. Must be called before
    torch is imported."""
    # Threads that wait must not keep a core from the loader, another rank or another program.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Pages of 2 MB spare a CPU walks through its tables of pages; torch reads it at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Its C++ warnings, with a stack of C++ functions, say what the error of a lost connection says in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Row counts change with each step: segments of GPU memory that grow fragment less. CUDA reads it when it starts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def settle_home() -> None:
    """Set HOME to a temporary folder, one for all processes, if the user's is missing, as in a container or a batch
    system, and say so once per node."""
    home = os.path.expanduser("~")
    if home != "~" and os.path.isdir(home):
        return
    os.environ["HOME"] = str(_temporary_home())
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note = f"note: no home folder: caches go to {os.environ['HOME']}; set HOME to a folder that stays"
        print(note, file=sys.stderr, flush=True)


def _temporary_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"m3ae_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # somebody else's, made to be found
        return Path(tempfile.mkdtemp(prefix="m3ae_fast-"))
    return folder
