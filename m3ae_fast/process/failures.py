"""Failures that a user can fix, as one-line errors."""

from __future__ import annotations

from m3ae_fast.base.errors import RankLost, UserError, one_line
from m3ae_fast.base.memory import limit_note, out_of_memory
from m3ae_fast.process.workers import IN_WORKER, SHM

# what gloo and the store say when the process at the other end is gone
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "failed to recv", "failed to send")
_CONTINUE = "--resume auto continues from the last checkpoint"


def rank_lost(who: str) -> RankLost:
    """Return the error of a rank that has found out that `who` has ended."""
    reason = "see its output for the reason, unless it was killed or its node was lost"
    return RankLost(f"{who} exited; {reason}. {_CONTINUE}")


def explain(error: BaseException) -> UserError | None:
    """Return the error for the user; None if it is a bug of ours."""
    if isinstance(error, UserError):
        return error
    if "DataLoader worker" in str(error):
        return _explain_worker(error)
    if out_of_memory(error):
        return UserError(
            "out of memory: lower train.micro_batch, set train.activation_checkpointing, raise the ZeRO stage, or "
            "choose a smaller model; --dry-run estimates what a config needs" + limit_note()
        )
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST):
        return rank_lost("another rank")
    line = one_line(error)
    return None if line is None else UserError(line)


def _explain_worker(error: BaseException) -> UserError | None:
    """Do the same for an error that a loader worker raised, or for the end of one."""
    text = f"{error} {error.__cause__}"  # torch may raise the signal's error from within another one
    lower = f"lower data.workers or data.prefetch; {_CONTINUE}"
    # a worker finds no shared memory when it asks for it (torch names the file), or when it writes there
    if ("No space left" in text and "</torch_" in text) or "Bus error" in text:
        return UserError(
            f"{SHM} is full, so that a loader worker could not hand over a batch: see what else fills it, raise it "
            f"(docker run --shm-size, or --ipc=host), or {lower}"
        )
    if out_of_memory(error):
        return UserError(f"a loader worker is out of memory: {lower}")
    if IN_WORKER in text:  # it raised an exception, with its traceback in the message: a bug
        return None
    if "killed by signal" in text:
        return UserError(f"a loader worker was killed, perhaps for lack of memory: {lower}")
    if "exited unexpectedly" in text:
        return UserError(f"a loader worker ended unexpectedly; its output may say why. {_CONTINUE}")
    return None
