"""How far a run has come and how it ended: a file in its folder, for whoever asks later."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from m3ae_fast.base.atomic_file import write_whole
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.training.run_folder import is_held

RECORD_FILE = "status.json"
RUNNING, FINISHED, STOPPED, FAILED = STATES = "running", "finished", "stopped", "failed"


@dataclass(frozen=True)
class Record:
    """What the run itself last wrote; one that was killed still says that it is running."""

    state: str
    step: int  # optimiser steps taken
    total_steps: int
    reason: str = ""  # of a stop or a failure


class Recorder:
    """Writes the record of a run, from its first step on."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._path, self._total = folder / RECORD_FILE, total_steps
        self._begun = False

    def begin(self, step: int) -> None:
        """Record that the run has begun to take steps. Raises UserError if the disk refuses."""
        self._begun = True
        self._write(RUNNING, step)

    def change(self, step: int, total_steps: int) -> None:
        """Record, after `step` steps, that the run has another number of steps. A full disk leaves the record as it
        was."""
        self._total = total_steps
        if self._begun:
            with contextlib.suppress(UserError):
                self._write(RUNNING, step)

    @contextmanager
    def ending(self, step: Callable[[], int], reason: Callable[[], str]) -> Iterator[None]:
        """Record how a run that has begun leaves the block, after which step, and for what `reason` it stopped. A full
        disk leaves the record as it was."""
        state, why = FAILED, ""
        try:
            yield
            state = FINISHED if step() >= self._total else STOPPED
            why = reason() if state == STOPPED else ""
        except BaseException as error:
            from m3ae_fast.process.failures import explain  # here: it imports torch, and `status` reads records alone

            why = " ".join(str(explain(error) or error).split()) or type(error).__name__
            raise
        finally:
            if self._begun:
                with contextlib.suppress(UserError):
                    self._write(state, step(), why)

    def _write(self, state: str, step: int, reason: str = "") -> None:
        write_whole(self._path, json.dumps(asdict(Record(state, step, self._total, reason))) + "\n")


def status(run: Path) -> tuple[str, str]:
    """Return a run folder's state, one of STATES, and a sentence about it. Raises UserError if no run has taken a
    step in it, or its record is damaged."""
    held = is_held(run)
    try:
        record = Record(**read_json(run / RECORD_FILE))
        if record.state not in STATES:
            raise ValueError(f"state {record.state!r}")
        of = f"step {_last_step(run, record.step):,} of {record.total_steps:,}"
    except OSError:
        raise UserError(f"{run}: no run has taken a step there ({RECORD_FILE} is missing)") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / RECORD_FILE}: is damaged ({error})") from None
    if held or is_held(run):  # it may have ended, or begun, while its record was read
        return "running", f"running, {of} logged"
    if record.state == RUNNING:
        return "failed", f"failed: killed after {of} was logged; --resume auto continues from its last checkpoint"
    reason = f" ({record.reason})" if record.reason else ""
    return record.state, f"{record.state} at {of}{reason}"


def _last_step(run: Path, recorded: int) -> int:
    """Return the last step that is known of: the record's, or one that was logged since."""
    with contextlib.suppress(UserError):  # it has logged none
        return max(recorded, read_metrics(run)[-1]["step"])
    return recorded
