"""Checkpoints, which are written atomically, and can be written and read by any number of ranks."""

from m3ae_fast.checkpoint.folder import (
    FAILED,
    GOOD,
    INFO_FILE,
    Info,
    before_decay,
    checkpoints_dir,
    is_good,
    locate,
    mark,
    open_state,
    prune,
    read_info,
    read_weights,
    saved_steps,
    set_aside_after,
    step_folder,
    step_of,
    versions,
)
from m3ae_fast.checkpoint.writing import save
