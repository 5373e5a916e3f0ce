"""Train with a simulated clock, on which every step takes ten seconds, or seventy seconds on ranks other than the main
rank."""

import os
from types import SimpleNamespace

from m3ae_fast import train
from m3ae_fast.training import time_limit
from m3ae_fast.training.time_limit import TimeLimit

STEP_S = 10.0


def main(argv: list[str] | None) -> int:
    now, counted = [0.0], TimeLimit.step_taken

    def step_taken(limit: TimeLimit) -> None:
        now[0] += STEP_S if os.environ.get("RANK", "0") == "0" else 7 * STEP_S
        counted(limit)

    TimeLimit.step_taken = step_taken
    time_limit.time = SimpleNamespace(monotonic=lambda: now[0])
    return train.main(argv)
