"""Failures that a user can fix, as one-line errors."""

from __future__ import annotations

from m3ae_fast.data.shared_memory import SHM
from m3ae_fast.data.workers import SHM_FULL
from m3ae_fast.errors import UserError
from m3ae_fast.memory import limit_note, out_of_memory

# what gloo and the store say when the process at the other end is gone
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv", "failed to send")
_CONTINUE = "--resume auto continues from the last checkpoint"
# what torch says of a loader worker that found no shared memory, when it asked for it or when it wrote there
_SHM_FULL = (f"exit code {SHM_FULL}", "Bus error")


def explain(error: BaseException) -> UserError | None:
    """Return the error for the user; None if it is a bug of ours."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return UserError(
            "out of memory: lower train.micro_batch, set train.activation_checkpointing, raise the ZeRO stage, or "
            "choose a smaller model; --dry-run estimates what a config needs" + limit_note()
        )
    if "DataLoader worker" in str(error):
        if any(sign in f"{error} {error.__cause__}" for sign in _SHM_FULL):
            return UserError(
                f"{SHM} is full, so that a loader worker could not hand over a batch: see what else fills it, raise it "
                f"(docker run --shm-size, or --ipc=host), or lower data.workers or data.prefetch; {_CONTINUE}"
            )
        killed = "a loader worker was killed, perhaps for lack of memory"
        return UserError(f"{killed}: lower data.workers or data.prefetch; {_CONTINUE}")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST):
        return UserError(f"another rank has ended; its output says why. {_CONTINUE}")
    return None
