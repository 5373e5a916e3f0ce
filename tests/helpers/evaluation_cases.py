"""Evaluations and steps in which some ranks have no samples: run by test_empty_batches.py.

    python -m torch.distributed.run --nproc-per-node 3 -m tests.helpers.evaluation_cases FILE

Writes the results of evaluations and the losses of the steps between them, by engine.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from m3ae_fast.batch import pack
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.data.rank_share import MicroBatches, Share
from m3ae_fast.engine import deepspeed_engine
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.validation_metrics import Baselines, evaluate
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.zero_cases import LR, config_of, engine_of, samples

PER_STEP = 6  # number of samples over all ranks
# The numbers of samples of the evaluations. A single sample is on one rank, and so is the last of 7, in a second step.
# With 12 samples, every rank has samples in both steps.
COUNTS = (1, 7, 12)
TRAINED = (PER_STEP, 2)  # numbers of samples of the training steps


def batches(ranks: Ranks, engine: ModelEngine, count: int) -> list[Any]:
    """Return this rank's batches of `count` samples. All ranks have the same number of batches, some of which are
    empty."""
    share = Share(PER_STEP, rank=ranks.rank, world=ranks.world)
    parts = MicroBatches(range(-(-count // PER_STEP)), share, end=count)
    everything = samples(9, text=True)
    return [pack([everything[position] for position in part], engine.model.geometry) for part in parts]


def run(ranks: Ranks, stage: int | None) -> list[Any]:
    deepspeed_engine.PERSISTENT = 0  # otherwise no weight of such a small model would be split
    engine = engine_of(ranks, config_of(1, stage, 1, "fp32", {}))
    found: list[Any] = []
    for trained in (*TRAINED, 0):
        for count in COUNTS:
            baselines = Baselines(engine.model, "fp32", ranks)
            own = batches(ranks, engine, count)
            found.append(evaluate(engine, own, ranks, lambda batch: batch, baselines))
        if trained:
            (own,) = batches(ranks, engine, trained)
            total = ranks.sum(own.counts)
            losses, norm = engine.step([own], LossCounts(*(part / ranks.world for part in total)), LR)
            (loss,) = ranks.sum([losses[0].loss.item()])
            found.append({"loss": loss / ranks.world, "norm": float(norm)})
    return found


def main(argv: list[str] | None = None) -> int:
    (out,) = argv or sys.argv[1:]
    logging.disable(logging.WARNING)
    with join_ranks() as ranks:
        torch.set_num_threads(1)
        found = {str(stage): run(ranks, stage) for stage in (None, 0, 1, 2, 3)}
        if ranks.is_main:
            Path(out).write_text(json.dumps(found))
        ranks.gather(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
