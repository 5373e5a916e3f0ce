"""Brings the micro-batches of each step to the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch

from m3ae_fast.batch.packed import PackedBatch

Sums = TypeVar("Sums")


@dataclass(frozen=True)
class StepInput(Generic[Sums]):
    """The micro-batches of one step."""

    host: list[PackedBatch]
    device: list[PackedBatch]
    waited: float  # seconds that this rank waited for the loader
    sums: Callable[[], Sums]  # waits for the sums over ranks that `start_sums` began


def feed(
    loader: Iterable[PackedBatch],
    accumulation: int,
    device: torch.device,
    start_sums: Callable[[list[PackedBatch]], Callable[[], Sums]],
) -> Iterator[StepInput[Sums]]:
    """Yield steps of `accumulation` micro-batches. `start_sums` begins an all-reduce for each.

    Each is fetched when the one before has been launched. A GPU is still at work on that one then: waiting for the
    loader, summing over ranks, and copying, on a stream of its own, all overlap with the computation.
    """
    batches = iter(loader)
    move = _copier(device)
    while True:
        started = time.perf_counter()
        host = list(islice(batches, accumulation))
        if not host:
            return
        waited = time.perf_counter() - started
        sums = start_sums(host)
        yield StepInput(host, move(host), waited, sums)


def _copier(device: torch.device) -> Callable[[list[PackedBatch]], list[PackedBatch]]:
    if device.type != "cuda":
        return lambda host: host
    stream = torch.cuda.Stream(device)

    def move(host: list[PackedBatch]) -> list[PackedBatch]:
        with torch.cuda.stream(stream):
            moved = [batch.to(device, non_blocking=True) for batch in host]
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for batch in moved:
            batch.record_stream(current)
        return moved

    return move
