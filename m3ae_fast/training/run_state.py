"""The state of a run: a file in its folder that records its progress and how it ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.training.run_lock import is_held

RECORD_FILE = "status.json"
RUNNING, FINISHED, STOPPED, FAILED = STATES = "running", "finished", "stopped", "failed"


@dataclass(frozen=True)
class Record:
    """The content of the file, as the run has last written it. If the run was killed, the file still contains the state
    "running"."""

    state: str
    step: int  # optimiser steps taken
    total_steps: int
    reason: str = ""  # reason for a stop or a failure


class Recorder:
    """Writer of a run's record, from its first step on."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._path, self._total = folder / RECORD_FILE, total_steps
        self._begun = False

    def begin(self, step: int) -> None:
        """Record that the run has started. Raises UserError if the file cannot be written."""
        self._begun = True
        self._write(RUNNING, step)

    def change(self, step: int, total_steps: int) -> None:
        """Record that the total number of steps has changed after `step` steps. If the disk is full, the record is
        unchanged."""
        self._total = total_steps
        if self._begun:
            with contextlib.suppress(UserError):
                self._write(RUNNING, step)

    def is_finished(self) -> bool:
        """Return whether the record states that the run is finished."""
        with contextlib.suppress(UserError):
            return status(self._path.parent)[0] == FINISHED
        return False

    @contextmanager
    def ending(
        self, step: Callable[[], int], reason: Callable[[], str], explain: Callable[[BaseException], UserError | None]
    ) -> Iterator[None]:
        """Record how a started run ends: its step, and either the `reason` for which it was stopped or the text of the
        error. If the disk is full, the record is unchanged. Use as a context manager.

        `explain`: function that returns an error as a UserError, or None for a bug.
        """
        state, why = FAILED, ""
        try:
            yield
            state = FINISHED if step() >= self._total else STOPPED
            why = reason() if state == STOPPED else ""
        except BaseException as error:
            why = " ".join(str(explain(error) or error).split()) or type(error).__name__
            raise
        finally:
            if self._begun:
                with contextlib.suppress(UserError):
                    self._write(state, step(), why)

    def _write(self, state: str, step: int, reason: str = "") -> None:
        write_text_atomically(self._path, json.dumps(asdict(Record(state, step, self._total, reason))) + "\n")


def status(run: Path) -> tuple[str, str]:
    """Return the state of a run folder, one of STATES, and a sentence about it. Raises UserError if no run has taken a
    step in it, or if its record is damaged."""
    held = is_held(run)
    try:
        record = Record(**read_json(run / RECORD_FILE))
        if record.state not in STATES:
            raise ValueError(f"unknown state {record.state!r}")
        of = f"step {_last_step(run, record.step):,} of {record.total_steps:,}"
    except OSError:
        raise UserError(f"{run}: no run has taken a step in this folder ({RECORD_FILE} is missing)") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / RECORD_FILE}: is damaged ({error})") from None
    if held or is_held(run):  # the run may have ended or begun while its record was read
        return "running", f"running, {of} logged"
    if record.state == RUNNING:
        return (
            "failed",
            f"failed: killed after {of} was logged; to continue, repeat the command (train: with --resume auto)",
        )
    reason = f" ({record.reason})" if record.reason else ""
    return record.state, f"{record.state} at {of}{reason}"


def _last_step(run: Path, recorded: int) -> int:
    """Return the last known step: the recorded step, or a step that was logged later."""
    with contextlib.suppress(UserError):  # no step has been logged
        return max(recorded, read_metrics(run)[-1]["step"])
    return recorded
