"""One-line error messages for failures that a user can fix. `heartbeats.py` detects ranks that do not respond."""

from __future__ import annotations

from m3ae_fast.base.errors import RankLost, UserError, one_line
from m3ae_fast.base.memory import limit_note, out_of_memory
from m3ae_fast.process.how_to_resume import effect_of_resuming
from m3ae_fast.process.workers import IN_WORKER, SHM

# messages of gloo and the store when the process at the other end is gone
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "failed to recv", "failed to send")


def rank_lost(who: str) -> RankLost:
    """Return the error for a rank that has detected that `who` has ended."""
    reason = "see its output for the reason, unless it was killed or its node was lost"
    return RankLost(f"{who} exited; {reason}. {effect_of_resuming()}")


def explain(error: BaseException) -> UserError | None:
    """Return the error as a UserError; None if it is a bug in this package."""
    if isinstance(error, UserError):
        return error
    if "DataLoader worker" in str(error):
        return _explain_worker(error)
    if out_of_memory(error):
        return UserError(
            "out of memory: lower train.micro_batch, set train.activation_checkpointing, raise the ZeRO stage, or "
            "choose a smaller model; --dry-run estimates the memory of a config" + limit_note()
        )
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST):
        return rank_lost("another rank")
    line = one_line(error)
    return None if line is None else UserError(line)


def _explain_worker(error: BaseException) -> UserError | None:
    """Return the UserError for an error that a loader worker raised, or for a worker that ended; None if it is a
    bug."""
    text = f"{error} {error.__cause__}"  # the error that names the signal may only be the cause of `error`
    lower = f"lower data.workers; {effect_of_resuming()}"
    # Shared memory may run out when a worker allocates it (torch names the file) or when it writes to it.
    if ("No space left" in text and "</torch_" in text) or "Bus error" in text:
        return UserError(
            f"{SHM} is full, so a loader worker cannot pass on a batch: free space in it, enlarge it "
            f"(docker run --shm-size, or --ipc=host), or {lower}"
        )
    if out_of_memory(error):
        return UserError(f"a loader worker is out of memory: {lower}")
    if IN_WORKER in text:  # the worker raised an exception, whose traceback is in the message: a bug
        return None
    if "killed by signal" in text:
        return UserError(f"a loader worker was killed, perhaps for lack of memory: {lower}")
    if "exited unexpectedly" in text:
        return UserError(f"a loader worker ended unexpectedly; its output may show the reason. {effect_of_resuming()}")
    return None
