"""What goes wrong in ways that a user can mend, told as such."""

from __future__ import annotations

from m3ae_fast.errors import UserError
from m3ae_fast.hardware import out_of_memory

# gloo's words and the store's for a process at the other end that is no more
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv", "failed to send")


def explain(error: BaseException) -> UserError | None:
    """What to tell the user, None where the error is ours."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return UserError(
            "out of memory: lower train.micro_batch, set train.activation_checkpointing, raise the ZeRO stage, or "
            "choose a smaller model; --dry-run estimates what a config needs"
        )
    if "DataLoader worker" in str(error):
        return UserError(
            "a loader worker was killed, perhaps for want of memory: lower data.workers or data.prefetch; "
            "--resume auto goes on from the last checkpoint"
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST):
        return UserError("another rank has ended; its output says why. --resume auto goes on from the last checkpoint")
    return None
