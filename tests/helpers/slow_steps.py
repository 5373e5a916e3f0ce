"""Train with a simulated clock, on which every step takes ten seconds, or seventy seconds on ranks other than the main
rank."""

import os
from types import SimpleNamespace
from typing import Any

from m3ae_fast import train
from m3ae_fast.base import pace
from m3ae_fast.training.trainer import Trainer

STEP_S = 10.0


def main(argv: list[str] | None) -> int:
    now, take_step = [0.0], Trainer.take_step

    def slow_step(trainer: Trainer, *given: Any) -> Any:
        now[0] += STEP_S if os.environ.get("RANK", "0") == "0" else 7 * STEP_S
        return take_step(trainer, *given)

    Trainer.take_step = slow_step
    pace.time = SimpleNamespace(monotonic=lambda: now[0])
    return train.main(argv)
