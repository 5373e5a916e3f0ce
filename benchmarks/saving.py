"""Measure how long a step waits for a checkpoint, on every rank of a process group; run by test_saving.py.

In turns: each rank copies its part, as the engine does, and rank 0 gathers whole tensors one by one, as it did before.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.results import Row
from benchmarks.workload import make_config
from m3ae_fast.config import DeepSpeedConfig, ModelConfig, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.agreement import Agreement
from m3ae_fast.process.ranks import Ranks, join_ranks
from m3ae_fast.run import checkpoint
from m3ae_fast.run.parts import sha256, stage

MODEL = parse(ModelConfig, {"size": "small"}, "small")
ROUNDS = 5


def gather(engine: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Return the whole state on rank 0, nothing elsewhere."""
    state = {}
    for name, p in engine.model.named_parameters():
        for kind in ("model", *engine.kinds):
            tensor = engine._whole(p, kind)
            if ranks.is_main:
                state[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state


def seconds(work: Callable[[], Any], ranks: Ranks) -> tuple[float, Any]:
    """Return the time of the rank that takes longest, from when all begin, and this rank's result."""
    dist.barrier(group=ranks.control)
    begin = time.perf_counter()
    result = work()
    return max(ranks.gather(time.perf_counter() - begin)), result


def measure(zero: int | None, ranks: Ranks, agreed: Agreement, folder: Path) -> Row:
    config = make_config(MODEL, 4 * ranks.world, precision="fp32")
    if zero is not None:
        section = DeepSpeedConfig.model_validate({"zero_optimization": {"stage": zero}})
        config = config.model_copy(update={"deepspeed": section})
    engine = build_engine(M3AE(config.model, config.loss), config, ranks)
    buffer = stage(engine.fragments(), None)[1]
    total = sum(ranks.gather(len(buffer)))
    before, now, written, shared = [], [], [], []
    for number in range(ROUNDS):
        taken, whole = seconds(lambda: gather(engine, ranks), ranks)
        before.append(taken)

        def write(whole: dict[str, Tensor] = whole, file: Path = folder / f"{zero}-{number}") -> None:
            if ranks.is_main:
                save_file(whole, file)
                sha256(file)

        written.append(seconds(write, ranks)[0])
        del whole, write
        taken, (part, _) = seconds(lambda: stage(engine.fragments(), buffer), ranks)
        now.append(taken)
        info = checkpoint.Info(number, 0, 0, {}, {})

        def write_parts(part: Any = part, info: checkpoint.Info = info) -> None:
            checkpoint.save(folder / f"{zero}", part, info, 1, ranks=agreed)

        shared.append(seconds(write_parts, ranks)[0])
    return {
        "engine": "plain torch" if zero is None else f"ZeRO {zero}",
        "gathered: step waits, s": statistics.median(before),
        "parts: step waits, s": statistics.median(now),
        "ratio": statistics.median(a / b for a, b in zip(before, now)),
        "gathered: written in, s": statistics.median(written),
        "parts: written in, s": statistics.median(shared),
        "gathered: rank 0 holds, MB": total * 4 / 1e6,
        "parts: a rank holds at most, MB": max(ranks.gather(len(buffer))) * 4 / 1e6,
        "over its share": max(ranks.gather(len(buffer))) * ranks.world / total,
    }


def main(out: str) -> None:
    with join_ranks() as ranks, tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.from_main(own))
        agreed = Agreement(ranks.rank, ranks.world, ranks.store, threading.Event())
        rows = [measure(zero, ranks, agreed, folder) for zero in (None, 0, 1, 2, 3)]
        ranks.gather(None)
        if ranks.is_main:
            Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
