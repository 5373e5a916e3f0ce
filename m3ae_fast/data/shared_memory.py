"""Sizes the loader's prefetch to the shared memory in which workers hand over batches."""

from __future__ import annotations

import os

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.process.workers import SHM

MAX_BYTES = 8 << 30  # of a rank's batches that wait
FRACTION = 0.8  # of the free shared memory that all ranks of a node may fill
INDEX_BYTES = 64  # of index rows and weights, for each token of a sample


def batch_bytes(geometry: Geometry, micro_batch: int) -> int:
    """Return an upper bound on the bytes of a packed micro-batch."""
    itemsize = getattr(torch, geometry.image_dtype).itemsize
    image = geometry.channels * geometry.patch_size**2 * geometry.most_patches * itemsize
    return micro_batch * (image + INDEX_BYTES * (1 + geometry.most_patches + geometry.text_length))


def most_workers(size: int) -> int:
    """Return how many workers, at least 1, have room for two batches of `size` bytes: one waits, one is packed."""
    return max(1, int(min(_room(), 1e15) / (2 * size)))


def fitting_prefetch(prefetch: int, workers: int, size: int) -> int:
    """Return how many batches of `size` bytes each of `workers` prepares ahead: `prefetch`, or as many as fit MAX_BYTES
    and this rank's shared memory. Raises UserError if not even one fits, as with the 64 MB that Docker gives."""
    room = _room()
    if room < 2 * size * workers:
        raise UserError(
            f"{SHM}: has room for {room / 1e6:,.0f} MB per rank, but the batches of {workers} workers take "
            f"{2 * size * workers / 1e6:,.0f} MB: raise it (docker run --shm-size, or --ipc=host), or lower "
            "data.workers or train.micro_batch"
        )
    return max(1, min(prefetch, int(min(room, MAX_BYTES) / (size * workers)) - 1))


def _room() -> float:
    """Return the bytes of shared memory that this rank may fill."""
    return FRACTION * _free_bytes() / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free_bytes() -> float:
    try:
        status = os.statvfs(SHM)
    except OSError:  # not Linux: its size is unknown
        return float("inf")
    return status.f_bavail * status.f_frsize
