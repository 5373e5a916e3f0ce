"""Agreement between background threads of all ranks. It does not interfere with the training loop's collectives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch.distributed as dist

from m3ae_fast.base.errors import ErrorElsewhere, RankLost, UserError, attempt, error_report, raise_shared

T = TypeVar("T")

_PAUSE = 0.25  # maximum number of seconds between two polls of the store, which all ranks poll
_PATIENCE = 10.0  # seconds to wait for other ranks if this rank is about to exit
_SAID, _REFUSED, _FAILED = "said ", "refused ", "failed "


class Agreement:
    """Decisions that rank 0 makes from the reports of all ranks. Reports and decisions are exchanged through the shared
    store, where no thread can block the others."""

    def __init__(self, rank: int, world: int, store: dist.Store, leaving: threading.Event, number: int = 0) -> None:
        """Create the agreement. `number` must not have been used for another agreement in `store`, because the last
        decision of each agreement stays there. `leaving` is set if this rank is about to exit, perhaps because another
        rank has exited. Ranks that do not report within a few seconds after it is set are considered lost."""
        self.rank, self.world, self._number = rank, world, number
        self._store, self._leaving, self._round = store, leaving, 0

    def decide(self, report: str, judge: Callable[[list[str]], str]) -> str:
        """Apply `judge` to the reports of all ranks, on rank 0, and return its result on every rank. All ranks must
        make the same number of calls. Raises UserError on every rank if `judge` raises one, or if another rank has
        exited. Any other error of `judge` is raised as ErrorElsewhere on the other ranks."""
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
        """Run `work` on every rank and return its result. An error on any rank is raised on all ranks; see
        `raise_shared`. All ranks must make the same number of calls."""
        result, error = attempt(work)
        own = error_report(error, f"rank {self.rank}")
        raise_shared(error, json.loads(self.decide(json.dumps(own), _error_reports)))
        return cast(T, result)

    def _judge(self, report: str, judge: Callable[[list[str]], str]) -> str:
        others = [self._key(rank) for rank in range(1, self.world)]
        answer = f"{_FAILED}rank 0 failed"
        try:
            verdict = judge([report, *self._await(others)])
            answer = f"{_SAID}{verdict}"
        except BaseException as error:
            line, complete = error_report(error, "rank 0") or ("", True)
            answer = f"{_REFUSED if complete else _FAILED}{line}"
            raise
        finally:
            self._store.set(self._key(0), answer)
            for key in (*others, self._key(0, self._round - 1)):  # all ranks have read these
                self._store.delete_key(key)
        return verdict

    def _key(self, rank: int, at: int | None = None) -> str:
        return f"agreement {self._number} {self._round if at is None else at} {rank}"

    def _await(self, keys: Sequence[str]) -> list[str]:
        pause, end = 0.001, float("inf")
        while not self._store.check(list(keys)):  # `wait` would print a warning at each poll
            if self._leaving.is_set():
                end = min(end, time.monotonic() + _PATIENCE)
            if time.monotonic() > end:
                raise RankLost("another rank exited during a save")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return [self._store.get(key).decode() for key in keys]


def _error_reports(reports: list[str]) -> str:
    """Return the error reports of the ranks that have one, as JSON."""
    return json.dumps([each for each in map(json.loads, reports) if each])
