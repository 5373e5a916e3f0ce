"""Train with ZeRO-3 as the program does, except that even small weights are split over ranks."""

from m3ae_fast import train
from m3ae_fast.engine import deepspeed_engine


def main(argv: list[str] | None) -> int:
    deepspeed_engine.PERSISTENT = 0
    return train.main(argv)
