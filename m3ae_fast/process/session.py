"""The beginning and the end of every program on several ranks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from m3ae_fast.base.errors import ErrorElsewhere, RankLost, UserError
from m3ae_fast.process.failures import explain, rank_lost
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.helper_process import Node, Standby
from m3ae_fast.process.ranks import Ranks, join_ranks
from m3ae_fast.process.signals import BY_ANOTHER, StopRequest
from m3ae_fast.process.stopping import Stopped


class Session(NamedTuple):
    """What a program on several ranks has: the ranks, who asks them to stop, their pulse, and who fetches."""

    ranks: Ranks
    stop: StopRequest
    pulse: Pulse
    fetcher: Standby

    def node(self) -> Node:
        """Return the ranks of this machine. Every rank must call it."""
        return Node(self.ranks.from_main(uuid.uuid4().hex), self.ranks.of_node, self.fetcher)


def raise_once(error: Exception, ranks: Ranks) -> NoReturn:
    """Raise what `explain` makes of an error that other ranks may share, on the rank that comes here first; the others
    exit with its code, and ranks that end because of another one's bug print nothing either. What `explain` has no line
    for is raised as it is."""
    shown = explain(error)
    if shown is None:
        raise error
    if isinstance(shown, RankLost) and ranks.main_has_ended():
        shown = rank_lost("rank 0")
    is_first, code = _first(shown, ranks)
    if is_first and not isinstance(shown, ErrorElsewhere):
        raise shown from None
    raise SystemExit(code) from None


def _first(shown: UserError, ranks: Ranks) -> tuple[bool, int]:
    """Return whether this rank is the first to end with an error, and the exit code of the first one."""
    try:
        return ranks.first_error(shown.exit_code)
    except RuntimeError:  # rank 0 has taken the store with it
        if not isinstance(shown, RankLost):  # which it printed
            return False, shown.exit_code
    try:
        return ranks.first_error(shown.exit_code, of_node=True)
    except RuntimeError:  # the store of this node was in rank 0, or has ended too
        return True, shown.exit_code


@contextmanager
def joined_program() -> Iterator[Session]:
    """Join the other ranks for as long as the program runs.

    An error that `explain` has a line for is printed once, by the first rank that meets it; all exit with its code. One
    that follows from a rank that left before there was anything to save is ignored: the program ends there, as it does
    where all ranks are Stopped.
    """
    with (
        Standby() as fetcher,  # forked before there are threads, connections to other ranks, or a GPU's memory
        StopRequest() as stop,
        join_ranks() as ranks,
        Pulse(ranks.rank, ranks.rooms, ranks.store, stop) as pulse,
    ):
        stop.joined(pulse.tell_stop)
        try:
            yield Session(ranks, stop, pulse, fetcher)
        except Stopped:
            return
        except Exception as error:
            if pulse.stop_told():  # a rank that left has taken its connections with it
                stop.leave(BY_ANOTHER)
                return
            raise_once(error, ranks)
