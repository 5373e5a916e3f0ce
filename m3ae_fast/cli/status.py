"""Print whether a run is finished, stopped, running or failed, and at which step. The exit code is:

0  finished: it has taken its last step
3  stopped by a user or the system; --resume auto continues
4  running: a process has locked its folder
5  failed: it ended with an error, or was killed
2  there is no run, or it has not taken a step yet
"""

from __future__ import annotations

import sys
from pathlib import Path

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import program
from m3ae_fast.training.run_state import status

CODES = {"finished": 0, "stopped": 3, "running": 4, "failed": 5}


def main(argv: list[str] | None = None) -> int:
    parser = program("status", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    state, sentence = status(parser.parse_args(argv).run)
    print(sentence)
    return CODES[state]


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
