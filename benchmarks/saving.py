"""Measurement of the time that a step waits for a checkpoint, on every rank of a process group. test_saving.py starts
this program.

Two methods alternate. With parts, each rank copies its part while the next step computes its gradients, as in the
training loop. With gathering, rank 0 gathers complete tensors one by one between two steps, as in earlier versions.
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
from benchmarks.workload import make_batch, make_config
from m3ae_fast import checkpoint
from m3ae_fast.checkpoint.staging import Staging
from m3ae_fast.checkpoint.state_files import sha256
from m3ae_fast.config import DeepSpeedConfig, ModelConfig, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.agreement import Agreement
from m3ae_fast.process.background import Background
from m3ae_fast.process.ranks import Ranks, join_ranks

MODEL = parse(ModelConfig, {"size": "small"}, "small")
ROUNDS = 3


def gather(engine: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Return the complete state on rank 0, and an empty dict on other ranks."""
    state = {}
    for name, p in engine.model.named_parameters():
        for kind in ("model", *engine.kinds[name]):
            tensor = engine._whole(p, kind)
            if ranks.is_main:
                state[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state


def seconds(work: Callable[[], Any], ranks: Ranks) -> tuple[float, Any]:
    """Run `work` on all ranks at the same time. Return the time of the slowest rank in seconds, and this rank's
    result."""
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
    batch, _ = make_batch(config, 4, seed=ranks.rank)
    staging, saving, waits = Staging(), Background(), []

    def wait() -> None:
        began = time.perf_counter()
        staging.wait()
        waits.append(time.perf_counter() - began)

    def step() -> None:
        engine.step([batch], batch.counts, 1e-4)

    engine.before_update = wait
    part = staging.copy(engine.fragments)
    held = sum(len(piece.data) for piece in part.values())
    total = sum(ranks.gather(held))
    for _ in range(2):
        step()
    plain, before, now, during, written, shared = [], [], [], [], [], []
    for number in range(ROUNDS):
        plain.append(seconds(step, ranks)[0])
        taken, whole = seconds(lambda: gather(engine, ranks), ranks)
        before.append(taken)

        def write(whole: dict[str, Tensor] = whole, file: Path = folder / f"{zero}-{number}") -> None:
            if ranks.is_main:
                save_file(whole, file)
                sha256(file)

        written.append(seconds(write, ranks)[0])
        del whole, write
        dist.barrier(group=ranks.control)
        began = time.perf_counter()
        staging.begin(ranks.device)
        saving.start(lambda: staging.copy(engine.fragments))
        begun = time.perf_counter() - began
        during.append(seconds(step, ranks)[0])
        now.append(max(ranks.gather(begun + waits[-1])))
        saving.wait()
        info = checkpoint.Info(number, 0, 0, {}, {})

        def write_parts(part: Any = part, info: checkpoint.Info = info) -> None:
            checkpoint.save(folder / f"{zero}", part, info, 1, ranks=agreed)

        shared.append(seconds(write_parts, ranks)[0])
    return {
        "engine": "plain torch" if zero is None else f"ZeRO {zero}",
        "gathered: delay of a step, s": statistics.median(before),
        "parts: delay of a step, s": statistics.median(now),
        "ratio of the delays": statistics.median(a / b for a, b in zip(before, now)),
        "gathered: time to write, s": statistics.median(written),
        "parts: time to write, s": statistics.median(shared),
        "time of a step, s": statistics.median(plain),
        "time of a step during the copy, s": statistics.median(during),
        "gathered: memory of rank 0, MB": total * 4 / 1e6,
        "parts: maximum memory of a rank, MB": max(ranks.gather(held)) * 4 / 1e6,
        "memory relative to the rank's partition": max(ranks.gather(held)) * ranks.world / total,
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
