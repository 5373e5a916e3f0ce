"""Transfer of the micro-batches of each step to the device."""

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
    """The micro-batches of one step, on the host and on the device."""

    host: list[PackedBatch]
    device: list[PackedBatch]
    waited: float  # seconds that this rank waited for the loader
    sums: Callable[[], Sums]  # waits for the all-reduce that `start_sums` started, and returns its result


def feed(
    loader: Iterable[PackedBatch],
    accumulation: int,
    device: torch.device,
    start_sums: Callable[[list[PackedBatch]], Callable[[], Sums]],
) -> Iterator[StepInput[Sums]]:
    """Yield the inputs of each step, with `accumulation` micro-batches. `start_sums` starts an all-reduce for
    the micro-batches of a step, and returns a function that waits for the result.

    The input of a step is prepared after the previous step has been launched. Loading, the all-reduce and the copy to
    the device, which uses a separate stream, therefore overlap with the GPU's computation of the previous step.
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
