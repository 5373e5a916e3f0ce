"""Agreement between background threads of all ranks, without interfering with the collectives of the training loop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch.distributed as dist

from m3ae_fast.base.errors import ErrorElsewhere, RankLost, UserError, attempt, raise_shared, told

T = TypeVar("T")

_PAUSE = 0.25  # seconds, the longest between two looks: many ranks ask one store
_PATIENCE = 10.0  # seconds for the others where this rank is about to leave
_SAID, _REFUSED, _FAILED = "said ", "refused ", "failed "


class Agreement:
    """Decisions that rank 0 makes from the reports of all ranks. Reports and decisions are exchanged through the shared
    store, which no thread can block for the others."""

    def __init__(self, rank: int, world: int, store: dist.Store, leaving: threading.Event) -> None:
        """Take the only agreement over `store`. `leaving`: set where this rank is about to end, perhaps since another
        has; one that is then not heard of within seconds is given up."""
        self.rank, self.world = rank, world
        self._store, self._leaving, self._round = store, leaving, 0

    def decide(self, report: str, judge: Callable[[list[str]], str]) -> str:
        """Apply `judge` to the reports of all ranks on rank 0 and return its result on every rank. All ranks must make
        the same number of calls. Raises UserError on every rank if `judge` raises one, or if another rank has left; any
        other error of it ends the other ranks with ErrorElsewhere."""
        if self.world == 1:
            return judge([report])
        self._round += 1
        if self.rank == 0:
            return self._judge(report, judge)
        self._store.set(self._key(self.rank), report)
        (answer,) = self._await([self._key(0)])
        if answer.startswith(_REFUSED):
            raise UserError(answer.removeprefix(_REFUSED))
        if answer.startswith(_FAILED):
            raise ErrorElsewhere(answer.removeprefix(_FAILED))
        return answer.removeprefix(_SAID)

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which every rank runs. An error on any rank ends all of them, as `raise_shared`
        says. Every rank must call it as often."""
        result, error = attempt(work)
        own = told(error, f"rank {self.rank}")
        raise_shared(error, json.loads(self.decide(json.dumps(own), _all_told)))
        return cast(T, result)

    def _judge(self, report: str, judge: Callable[[list[str]], str]) -> str:
        others = [self._key(rank) for rank in range(1, self.world)]
        answer = f"{_FAILED}rank 0 has failed"
        try:
            verdict = judge([report, *self._await(others)])
            answer = f"{_SAID}{verdict}"
        except BaseException as error:
            line, complete = told(error, "rank 0") or ("", True)
            answer = f"{_REFUSED if complete else _FAILED}{line}"
            raise
        finally:
            self._store.set(self._key(0), answer)
            for key in (*others, self._key(0, self._round - 1)):  # which all have read
                self._store.delete_key(key)
        return verdict

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"agreement {self._round if number is None else number} {rank}"

    def _await(self, keys: Sequence[str]) -> list[str]:
        pause, end = 0.001, float("inf")
        while not self._store.check(list(keys)):  # its `wait` would print a warning of each time that it looks
            if self._leaving.is_set():
                end = min(end, time.monotonic() + _PATIENCE)
            if time.monotonic() > end:
                raise RankLost("another rank has ended in the midst of a save")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return [self._store.get(key).decode() for key in keys]


def _all_told(reports: list[str]) -> str:
    """Return what ranks told about their errors, without those that have none, as JSON."""
    return json.dumps([each for each in map(json.loads, reports) if each])
