"""Brings the micro-batches of each step to the device, one step ahead of the computation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch

from m3ae_fast.model.packing import PackedBatch


class Fed(NamedTuple):
    """The micro-batches of one step."""

    host: list[PackedBatch]
    device: list[PackedBatch]
    waited: float  # seconds that this rank waited for the loader


def feed(loader: Iterable[PackedBatch], accumulation: int, device: torch.device) -> Iterator[Fed]:
    """Steps of `accumulation` micro-batches. On CUDA the next step's copies run on a stream of their own while this
    one computes."""
    batches = iter(loader)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch() -> tuple[Fed, torch.cuda.Event | None]:
        started = time.perf_counter()
        host = list(islice(batches, accumulation))
        waited = time.perf_counter() - started
        if stream is None:
            return Fed(host, host, waited), None
        with torch.cuda.stream(stream):
            moved = [batch.to(device, non_blocking=True) for batch in host]
            copied = torch.cuda.Event()
            copied.record()
        return Fed(host, moved, waited), copied

    fed, copied = fetch()
    while fed.host:
        following = fetch()
        if copied is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for batch in fed.device:
                batch.record_stream(current)
        yield fed
        fed, copied = following
