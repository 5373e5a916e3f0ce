"""Say whether a run is finished, stopped, running or failed, and at which step; the exit code says it too.

0  finished: it has taken its last step
3  stopped: somebody or the system asked it to; --resume auto continues
4  running: a process holds its folder
5  failed: it ended with an error, or was killed
2  there is no run, or none that has taken a step
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from m3ae_fast.command_line import program
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.regular_file import read_json

CODES = {"finished": 0, "stopped": 3, "running": 4, "failed": 5}


def status(run: Path) -> tuple[str, str]:
    """Return a run folder's state, one of CODES, and a sentence about it. Raises UserError where no run has taken a
    step in it, or its record is damaged."""
    from m3ae_fast.run.record import RECORD_FILE, RUNNING, Record
    from m3ae_fast.run.run_folder import is_held

    held = is_held(run)
    try:
        record = Record(**read_json(run / RECORD_FILE))
        if record.state not in CODES:
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
    from m3ae_fast.run.run_log import read_metrics

    with contextlib.suppress(UserError):  # it has logged none
        return max(recorded, read_metrics(run)[-1]["step"])
    return recorded


def main(argv: list[str] | None = None) -> int:
    parser = program("status", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    state, sentence = status(parser.parse_args(argv).run)
    print(sentence)
    return CODES[state]


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
