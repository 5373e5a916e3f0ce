"""A home folder for users who have none, as in a container or a batch system."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def settle_home() -> None:
    """Set HOME to a temporary folder, one for all processes, if the user's is missing, and say so once per node."""
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
