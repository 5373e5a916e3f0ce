"""Number of batches that loader workers prepare in advance. The batches must fit into shared memory."""

from __future__ import annotations

import os

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.process.workers import SHM

PREFETCH = 4  # maximum number of batches that each worker prepares in advance
MAX_BYTES = 8 << 30  # maximum size in bytes of the batches that wait for a rank
FRACTION = 0.8  # fraction of the free shared memory that all ranks of a node may use
INDEX_BYTES = 64  # bytes of indices and weights per token of a sample


def batch_bytes(geometry: Geometry, micro_batch: int) -> int:
    """Return an upper bound on the bytes of a packed micro-batch."""
    itemsize = getattr(torch, geometry.image_dtype).itemsize
    image = geometry.channels * geometry.patch_size**2 * geometry.most_patches * itemsize
    return micro_batch * (image + INDEX_BYTES * (1 + geometry.most_patches + geometry.text_length))


def most_workers(size: int) -> int:
    """Return the maximum number of workers, at least 1, for which two batches of `size` bytes per worker fit into the
    shared memory: one batch waits while the next one is packed.
    """
    return max(1, int(min(_available_bytes(), 1e15) / (2 * size)))


def fitting_prefetch(workers: int, size: int) -> int:
    """Return the number of batches of `size` bytes that each of `workers` workers prepares in advance: PREFETCH, or
    fewer if these batches, together with one that each worker is packing, would exceed MAX_BYTES or this rank's shared
    memory. Raises UserError if not even two batches per worker fit into the shared memory, as with Docker's default of
    64 MB."""
    available = _available_bytes()
    if available < 2 * size * workers:
        raise UserError(
            f"{SHM}: has {available / 1e6:,.0f} MB available per rank, but the batches of "
            f"{counted(workers, 'worker')} take {2 * size * workers / 1e6:,.0f} MB: enlarge it (docker run --shm-size, "
            "or --ipc=host), or lower data.workers or train.micro_batch"
        )
    return max(1, min(PREFETCH, int(min(available, MAX_BYTES) / (size * workers)) - 1))


def _available_bytes() -> float:
    """Return the number of bytes of shared memory that this rank may use."""
    return FRACTION * _free_bytes() / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free_bytes() -> float:
    try:
        status = os.statvfs(SHM)
    except OSError:  # the size is unknown on systems other than Linux
        return float("inf")
    return status.f_bavail * status.f_frsize
