"""Prevents the garbage collector of forked processes from collecting objects of their parent. Importing this module is
enough.

A reference cycle that the parent has not collected yet may hold a process group or a store of torch.distributed. If a
forked loader worker collected it, the destructor would wait for threads that exist only in the parent, and the worker
would crash. Python's documentation of `gc.freeze` recommends calling it before a fork.
"""

from __future__ import annotations

import gc
import os

# whether objects were frozen before the current fork; objects that the training loop has frozen must stay frozen
_were_frozen = False


def _before() -> None:
    global _were_frozen
    _were_frozen = gc.get_freeze_count() > 0
    gc.freeze()


def _after_in_parent() -> None:
    if not _were_frozen:
        gc.unfreeze()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent)
