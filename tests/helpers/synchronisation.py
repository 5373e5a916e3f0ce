"""Runs steps of many engines on a CPU, and counts the operations that would make the host wait for a GPU. Run by
test_engine_synchronisation.py.

Writes one line of JSON per case to the file that is given as argument.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3ae_fast.batch import pack
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.zero_cases import TINY, build_deepspeed, samples

READS = {getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal")}


class Reads(TorchDispatchMode):
    """Counts the ops that copy a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Stream:
    """A stand-in for a stream of a GPU. `done`: for the name of each stream, how many of that stream's ops are known to
    be complete before this stream starts its next op."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits
        self.done: Counter = Counter()

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.name, other.name))
        self.done |= other.done


class Races(TorchDispatchMode):
    """Detects races: pairs of ops in different streams that use the same bytes without synchronisation, where at least
    one of the two writes. On a GPU, the result would be undefined. Storages are kept alive, as by `record_stream` on a
    GPU."""

    def __init__(self, cpu: StreamedCpu) -> None:
        super().__init__()
        self.cpu, self.found = cpu, Counter()
        self.ran: set[tuple[str, str]] = set()
        self.uses: dict[int, list[tuple[int, int, str, int, bool]]] = defaultdict(list)
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        stream = self.cpu.current
        stream.done[stream.name] += 1
        self.ran.add((stream.name, func.name()))
        # the schemas of collectives do not declare which arguments are written
        collective = func.name().startswith("c10d::")
        for argument, value in zip(func._schema.arguments, args):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            self._use(func.name(), stream, value, writes or collective)
        for value in (kwargs or {}).values():
            self._use(func.name(), stream, value, func._schema.is_mutable)
        return result

    def _use(self, name: str, stream: Stream, value: Any, writes: bool) -> None:
        for tensor in tree_leaves(value):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            storage = tensor.untyped_storage()
            self.alive.append(storage)
            first = tensor.storage_offset() * tensor.itemsize
            last = first + (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1) * tensor.itemsize
            uses = self.uses[storage.data_ptr()]
            for begin, end, other, count, wrote in uses:
                shared = (writes or wrote) and begin < last and first < end
                if shared and other != stream.name and count > stream.done[other]:
                    self.found[name] += 1
            uses.append((first, last, stream.name, stream.done[stream.name], writes))


class StreamedCpu:
    """DeepSpeed's CPU accelerator with simulated streams, which counts synchronisations with the whole device."""

    def __init__(self) -> None:
        self.synchronised = 0
        self.waits: list[tuple[str, str]] = []
        self.current = Stream("current", self.waits)
        kind = type(get_accelerator())
        for name, answer in {
            "synchronize": self._count,
            "resolves_data_dependency": lambda *_: False,
            "current_stream": lambda *_: self.current,
            "stream": lambda _, stream: self._on(stream),
        }.items():
            setattr(kind, name, answer)
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]

    def _count(self, *_) -> None:
        self.synchronised += 1

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def engine_of(stage: int | None, clip: float | None, precision: str, ranks: Ranks, accumulation: int = 1) -> Any:
    zero = None if stage is None else {"zero_optimization": {"stage": stage}}
    data = {
        "model": TINY,
        "data": {"train": [{"shards": "none.tar"}]},
        "optim": {"clip_grad": clip},
        "train": {"steps": 3, "global_batch": 16, "micro_batch": 16 // accumulation, "precision": precision},
        "deepspeed": zero,
    }
    config = parse(Config, data, "case")
    build = build_engine if stage is None else build_deepspeed
    return build(M3AE(config.model, config.loss), config, ranks)


def batches_of(engine: Any, count: int) -> list[Any]:
    return [pack(samples(step, text=True), engine.model.geometry) for step in range(count)]


def count(cpu: StreamedCpu, stage: int | None, clip: float | None, precision: str, ranks: Ranks) -> dict[str, Any]:
    """Return the numbers of reads and of synchronisations in the second step of an engine, and its gradient norm."""
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


def _counts(batches: list[Any]) -> LossCounts:
    return LossCounts(*map(sum, zip(*(batch.counts for batch in batches))))


def races(cpu: StreamedCpu, waits: bool, ranks: Ranks) -> dict[str, Any]:
    """Return the racing ops of a step with two micro-batches at stage 2. `waits`: whether streams are synchronised
    after the reductions of a micro-batch."""
    engine = engine_of(2, 1.0, "bf16", ranks, accumulation=2)
    optimizer = engine.ds.optimizer
    optimizer.reduction_stream = Stream("reduction", cpu.waits)
    first, *parts = batches_of(engine, 3)
    engine.step([first, first], _counts([first, first]), 1e-3)
    if not waits:
        epilogue = optimizer.independent_gradient_partition_epilogue

        def too_early() -> None:
            known = Counter(cpu.current.done)
            epilogue()
            cpu.current.done = known

        optimizer.independent_gradient_partition_epilogue = too_early
    with Races(cpu) as found:
        engine.step(parts, _counts(parts), 1e-3)
    reduced = sorted(name for stream, name in found.ran if stream == "reduction")
    return {"races": found.found, "reduced by": reduced}


def norm_of_nan(stage: int, ranks: Ranks) -> float:
    """Return the gradient norm of a step with NaN weights."""
    engine = engine_of(stage, 1.0, "bf16", ranks)
    (batch,) = batches_of(engine, 1)
    with torch.no_grad():
        next(iter(engine.model.parameters())).fill_(torch.nan)
    return float(engine.step([batch], batch.counts, 1e-3)[1])


def moments(stage: int | None, clip: float, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return AdamW's first moments after a step, which are the clipped gradients times a constant."""
    torch.manual_seed(0)
    engine = engine_of(stage, clip, "fp32" if stage is None else "bf16", ranks)
    (batch,) = batches_of(engine, 1)
    engine.step([batch], batch.counts, 1e-3)
    return engine.whole("exp_avg")


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
        lines += [{"case": ["races", waits]} | races(cpu, waits, ranks) for waits in (True, False)]
    Path(arguments[0]).write_text("\n".join(map(json.dumps, lines)))
    return 0
