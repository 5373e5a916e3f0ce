"""Counts what engines send over the network in a step, on two ranks: run by test_network_traffic.py.

Writes one line of JSON per case to the file that is given as argument: the settings, the number of parameters, how
many parameters are on the rank after a forward pass, and how many elements a rank passes to collectives, by operation
and dtype.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3ae_fast.config import Config
from m3ae_fast.engine import deepspeed_engine
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.zero_cases import SMALL_BUCKET, config_of, engine_of, take


class Traffic(TorchDispatchMode):
    """Counts the elements of the largest tensor of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, _, name = func.name().partition("::")
        if library == "c10d":
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            self.found[f"{name.strip('_')} {str(largest.dtype).removeprefix('torch.')}"] += largest.numel()
        return func(*args, **(kwargs or {}))


def _step(ranks: Ranks, config: Config) -> tuple[int, int, Counter[str]]:
    """Take a step. Return the number of parameters, how many parameters are on the rank after a forward pass, and the
    traffic."""
    engine = engine_of(ranks, config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    take(ranks, engine, config, range(2))
    kept: list[int] = []  # at stage 3, a weight that is not gathered has no elements
    engine.model.register_forward_hook(lambda model, *_: kept.append(sum(p.numel() for p in model.parameters())))
    with Traffic() as traffic:
        take(ranks, engine, config, range(2, 3))
    return parameters, min(kept), traffic.found


def main(argv: list[str] | None = None) -> int:
    (out,) = argv or sys.argv[1:]
    logging.disable(logging.WARNING)
    deepspeed_engine.PERSISTENT = 0  # at stage 3, the tiny weights are partitioned, too
    with join_ranks() as ranks, open(out if ranks.is_main else os.devnull, "w", encoding="utf-8") as file:
        torch.set_num_threads(1)
        every = itertools.product((None, 0, 1, 2, 3), ("fp32", "bf16"), ("fp32", "bf16"), (1, 2))
        for stage, precision, sums, accumulation in every:
            if stage is None and sums == "bf16":
                continue
            section = {} if stage is None else {"communication_data_type": sums}
            config = config_of(ranks.world, stage, accumulation, precision, SMALL_BUCKET if stage else {}, **section)
            print(json.dumps([stage, precision, sums, accumulation, *_step(ranks, config)]), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
