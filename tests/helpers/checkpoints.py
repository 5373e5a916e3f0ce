"""Checkpoints without a run, of one rank or of several ranks that are threads."""

from __future__ import annotations

import threading
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import resuming
from m3ae_fast.config import Config
from m3ae_fast.engine.fragments import Fragments, cut, whole
from m3ae_fast.process.agreement import Agreement
from tests.helpers.threads import map_threads


def save(run_dir: Path, tensors: dict[str, Tensor], info: checkpoint.Info, keep: int = 9) -> Path:
    """Save complete tensors as a single rank does, and return the checkpoint."""
    return checkpoint.save(run_dir, {name: whole(tensor) for name, tensor in tensors.items()}, info, keep)


def changes_of(path: Path, info: checkpoint.Info, config: Config, stream: dict[str, str]) -> list[str]:
    """Return the lines of `changes` for a pre-training run with this config and data that resumes from a checkpoint."""
    sections = config.model_dump(mode="json")
    return resuming.changes(path, info, sections, stream, resuming.PRETRAINING)


def agreements(world: int) -> list[Agreement]:
    """Return the agreements of ranks that are threads of this process."""
    store = dist.HashStore()
    return [Agreement(rank, world, store, threading.Event()) for rank in range(world)]


def save_parts(
    run_dir: Path, parts: list[Fragments], step: int = 1, info: checkpoint.Info | None = None
) -> list[Path | str]:
    """Save the part of each rank, and return the checkpoint or the text of the error by rank."""
    info = info or checkpoint.Info(step, 0, 42, {}, {})

    def one(part: Fragments, ranks: Agreement) -> Path | str:
        try:
            return checkpoint.save(run_dir, part, info, 9, ranks=ranks)
        except UserError as error:
            return str(error)

    return map_threads(one, parts, agreements(len(parts)))


def save_cut(
    run_dir: Path, tensors: dict[str, Tensor], world: int, step: int = 1, info: checkpoint.Info | None = None
) -> Path:
    """Save tensors as `world` ranks do if each has an equal part of them, and return the checkpoint."""
    found = save_parts(run_dir, [cut(tensors, rank, world) for rank in range(world)], step, info)
    (path,) = set(found)
    assert isinstance(path, Path), path
    return path
