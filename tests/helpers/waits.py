"""What would make the host wait for a GPU in steps of many engines, counted on a CPU: run by test_engine_waits.py.

Writes one line of JSON per case into the file that it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from m3ae_fast.batch import pack
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.zero_cases import TINY, samples

READS = {getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal")}


class Reads(TorchDispatchMode):
    """Count the ops that bring a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Stream:
    """Stands in for a GPU's."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.name, other.name))


class StreamedCpu:
    """DeepSpeed's CPU accelerator as one with streams, that counts waits for the whole device."""

    def __init__(self) -> None:
        self.synchronised = 0
        self.waits: list[tuple[str, str]] = []
        current = Stream("current", self.waits)
        kind = type(get_accelerator())
        for name, answer in {
            "synchronize": self._count,
            "resolves_data_dependency": lambda *_: False,
            "current_stream": lambda *_: current,
            "stream": lambda *_: contextlib.nullcontext(),
        }.items():
            setattr(kind, name, answer)
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]

    def _count(self, *_) -> None:
        self.synchronised += 1


def engine_of(stage: int | None, clip: float | None, precision: str, ranks: Ranks) -> Any:
    zero = None if stage is None else {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    data = {
        "model": TINY,
        "data": {"train": [{"shards": "none.tar"}]},
        "optim": {"clip_grad": clip},
        "train": {"steps": 3, "global_batch": 16, "precision": precision},
        "deepspeed": zero,
    }
    config = parse(Config, data, "case")
    return build_engine(M3AE(config.model, config.loss), config, ranks)


def batches_of(engine: Any, count: int) -> list[Any]:
    return [pack(samples(step, text=True), engine.model.geometry) for step in range(count)]


def count(cpu: StreamedCpu, stage: int | None, clip: float | None, precision: str, ranks: Ranks) -> dict[str, Any]:
    """Return what the second step of an engine reads and waits for, and its norm."""
    engine = engine_of(stage, clip, precision, ranks)
    optimizer = getattr(getattr(engine, "ds", None), "optimizer", None)
    if hasattr(optimizer, "reduction_stream"):
        optimizer.reduction_stream = Stream("reduction", cpu.waits)
    first, second = batches_of(engine, 2)
    engine.step([first], first.counts, 1e-3)
    cpu.synchronised, cpu.waits[:] = 0, []
    with Reads() as reads:
        _, norm = engine.step([second], second.counts, 1e-3)
    waits = sum(wait == ("current", "reduction") for wait in cpu.waits)
    return {"reads": reads.found, "synchronised": cpu.synchronised, "stream waits": waits, "norm": float(norm)}


def norm_of_nan(stage: int, ranks: Ranks) -> float:
    """Return the norm of a step with weights that are NaN."""
    engine = engine_of(stage, 1.0, "bf16", ranks)
    (batch,) = batches_of(engine, 1)
    with torch.no_grad():
        next(iter(engine.model.parameters())).fill_(torch.nan)
    return float(engine.step([batch], batch.counts, 1e-3)[1])


def moments(stage: int | None, clip: float, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return AdamW's first moments after a step: the clipped gradients, times a constant."""
    torch.manual_seed(0)
    engine = engine_of(stage, clip, "fp32" if stage is None else "bf16", ranks)
    (batch,) = batches_of(engine, 1)
    engine.step([batch], batch.counts, 1e-3)
    return {name: value for name, value in engine.state().items() if name.startswith("exp_avg/")}


def main(arguments: list[str]) -> int:
    lines: list[dict[str, Any]] = []
    with join_ranks() as ranks:
        for clip in (1e-3, 1e3):
            plain = moments(None, clip, ranks)
            for stage in (1, 2):
                found = moments(stage, clip, ranks)
                off = max(float((found[n] - plain[n]).norm() / plain[n].norm().clamp(min=1e-12)) for n in plain)
                lines.append({"case": ["clipped", stage, clip], "off": off})
        lines += [{"case": ["nan", stage], "norm": norm_of_nan(stage, ranks)} for stage in (0, 1, 2)]
        cpu = StreamedCpu()
        for case in itertools.product((None, 0, 1, 2), (None, 1.0), ("bf16", "fp32")):
            lines.append({"case": list(case)} | count(cpu, *case, ranks))
    Path(arguments[0]).write_text("\n".join(map(json.dumps, lines)))
    return 0
