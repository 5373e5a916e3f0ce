"""Environment variables that libraries read when they are imported or first used."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)


def configure_libraries() -> None:
    """Set environment variables that torch reads, except those that the user has set. Must be called before torch is
    imported.
    """
    # Waiting OpenMP threads must not occupy a core that the loader, another rank or another program could use.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Huge pages (2 MB) reduce TLB misses on the CPU; torch reads this variable at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # If a connection is lost, torch's C++ code logs warnings with a stack trace. They are hidden, because the Python
    # error explains the cause in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The number of tokens changes with each step, which fragments the GPU memory; expandable segments reduce this.
    # torch reads this variable when CUDA starts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def configure_home() -> None:
    """If the user's home folder is missing, as in some containers and batch systems, set HOME to a temporary folder
    that all processes share. Prints a note once per node."""
    home = os.path.expanduser("~")
    if home != "~" and os.path.isdir(home):
        return
    os.environ["HOME"] = str(_temporary_home())
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note = (
            f"note: there is no home folder, so caches are kept in {os.environ['HOME']}; set HOME to a permanent folder"
        )
        print(note, file=sys.stderr, flush=True)


def _temporary_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"m3ae_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # another user may have created it in advance
        return Path(tempfile.mkdtemp(prefix="m3ae_fast-"))
    return folder
