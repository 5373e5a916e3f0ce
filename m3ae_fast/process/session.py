"""Start and end of programs that run on several ranks."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import ErrorElsewhere, RankLost, UserError
from m3ae_fast.process.failure_messages import explain, rank_lost
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks, await_ends, join_ranks
from m3ae_fast.process.stop_request import BY_ANOTHER, StopRequest
from m3ae_fast.process.stoppable_loop import Stopped

_LAST_S = 0.5  # seconds that other ranks wait while one rank prints an error


class Session(NamedTuple):
    """The parts of a program on several ranks: the ranks, stop requests and heartbeats."""

    ranks: Ranks
    stop: StopRequest
    heartbeats: Heartbeats


def _raise_once(error: Exception, ranks: Ranks, heartbeats: Heartbeats) -> NoReturn:
    """Report an error once, even if it occurs on several ranks. The first rank that calls this function raises the
    UserError of `explain`; the other ranks raise ErrorElsewhere with the exit code of the first rank. An error that
    `explain` does not recognise is raised unchanged. `heartbeats`: heartbeats of this rank, which know the exit code if
    another rank has ended with an error."""
    shown = explain(error)
    if shown is None:
        raise error
    if isinstance(shown, RankLost) and ranks.main_has_ended():
        shown = rank_lost("rank 0")
    is_first, code = _first(shown, ranks, heartbeats)
    _keep_store(ranks)
    if is_first and not isinstance(shown, ErrorElsewhere):
        raise shown from None
    if ranks.world > 1:  # a launcher ends all ranks when the first one exits, even the rank that is still printing
        time.sleep(_LAST_S)
    elsewhere = ErrorElsewhere(str(shown))
    elsewhere.exit_code = code
    raise elsewhere from None


def _first(shown: UserError, ranks: Ranks, heartbeats: Heartbeats) -> tuple[bool, int]:
    """Return whether this rank is the first to end with an error, and the exit code of the first one."""
    try:
        return ranks.first_error(shown.exit_code)
    except RuntimeError:  # the store, which rank 0 hosts, is gone
        if not isinstance(shown, RankLost):  # rank 0 has printed it
            return False, shown.exit_code
    if heartbeats.first_error is not None:
        return False, heartbeats.first_error
    try:
        return ranks.first_error(shown.exit_code, of_node=True)
    except RuntimeError:  # the store of this node has ended too, or is the one that rank 0 hosted
        return True, shown.exit_code


def _keep_store(ranks: Ranks) -> None:
    """Let the process of rank 0, which hosts the store, wait at its exit until the other ranks have ended, because they
    read in the store why the program ends. Rank 0 waits after it has printed its message."""
    if ranks.world > 1 and ranks.is_main:
        atexit.register(await_ends, ranks.store, ranks.world)


def _end_stopped(ranks: Ranks) -> None:
    """Record the end of a rank that was stopped, so that rank 0 does not wait for it."""
    if ranks.world > 1:
        ranks.record_end()
    _keep_store(ranks)


@contextmanager
def joined_program(device: Device | None = None) -> Iterator[Session]:
    """Join the other ranks, yield the session of the program, and leave the ranks when the program ends. `device`: see
    `join_ranks`.

    An error that `explain` recognises is printed only by the first rank on which it occurs, and all ranks exit with its
    exit code. If a rank was stopped before there was anything to save, the errors that this causes on other ranks are
    ignored, and the program ends normally, as it does if all ranks raise Stopped.
    """
    with (
        StopRequest() as stop,
        join_ranks(device) as ranks,
        Heartbeats(ranks.rank, ranks.heartbeat_groups, ranks.store, stop) as heartbeats,
    ):
        stop.joined(heartbeats.request_stop)
        try:
            yield Session(ranks, stop, heartbeats)
        except Stopped:
            _end_stopped(ranks)
        except SystemExit:  # this rank was stopped before there was anything to save
            _end_stopped(ranks)
            raise
        except Exception as error:
            if heartbeats.stop_requested():  # a rank that stopped has closed its connections
                stop.request(BY_ANOTHER)
                _end_stopped(ranks)
                return
            _raise_once(error, ranks, heartbeats)
