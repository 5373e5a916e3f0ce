"""Checkpoint folders: their names, content and marks, and how they are read. A checkpoint is independent of the number
of ranks and of the ZeRO stage.

run.dir/checkpoints/step-00001234/
    state*.safetensors  float32 weights, Adam moments and, with train.ema, averaged weights: see `state_files`
    table.json          the files and slices that make up each tensor
    state.json          step, samples seen, seed, config, versions, the data's fingerprint, checksums of other files
    good                marks a checkpoint from whose weights a finite loss was computed
    failed              marks a checkpoint whose next step had a non-finite loss or gradient norm, and which
                        `--resume auto` skips

`writing.py` writes checkpoints.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from m3ae_kernels.version import __version__
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.checkpoint import state_files
from m3ae_fast.checkpoint.state_files import ANY_PART, State, damaged
from m3ae_fast.config import follow
from m3ae_fast.engine.optimizer import EMA

INFO_FILE = "state.json"
GOOD, FAILED = "good", "failed"


def _later(change: tuple[int, int]) -> tuple[int, int]:
    """Validate and return `change`, a change of the number of steps. Raises ValueError unless the new number is larger
    than the number of steps taken before the change."""
    step, total = change
    if not 0 <= step < total:
        raise ValueError(f"total number of steps changed to {total} at step {step}: the total must be larger")
    return change


@dataclass
class Info:
    """The content of a checkpoint except its tensors."""

    step: Annotated[int, Field(ge=0, lt=1 << 53)]  # optimiser steps taken
    samples: Annotated[int, Field(ge=0)]  # number of samples seen, which is the position in the sample order
    seed: int
    config: dict[str, dict[str, Any] | None]
    versions: dict[str, str]
    stream: dict[str, str] = field(default_factory=dict)  # fingerprint of the training data; see `data.fingerprint`
    sha256: dict[str, str] = field(default_factory=dict)  # checksums of the other files, by file name
    # name of the chosen attention kernel by part of the model; empty if none was chosen
    attention: dict[str, str] = field(default_factory=dict)
    # changes of the number of steps, as in `Schedule.changes`
    changes: list[Annotated[tuple[int, int], AfterValidator(_later)]] = field(default_factory=list)
    decays: bool = False  # whether the decay of a schedule that can be extended has begun
    spent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # seconds of training, if the run has a time limit


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints, whether or not it exists."""
    return Path(run_dir) / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`, whether or not it exists; `step_of` reads the step back."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name; -1 for other names."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def saved_steps(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, from the oldest to the latest."""
    steps = (p for p in checkpoints_dir(run_dir).glob("step-*") if (p / INFO_FILE).is_file() and any(p.glob(ANY_PART)))
    return sorted((p for p in steps if step_of(p) >= 0), key=step_of)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints except the last `keep`, the last one marked as good, and the last one before the learning
    rate decayed, from which a run can be extended."""
    saved = saved_steps(run_dir)
    kept = [*[path for path in saved if is_good(path)][-1:], before_decay(saved)]
    for old in saved[:-keep]:
        if old not in kept:
            removed = old.with_name(f".removing-{old.name}")  # renamed first, so that the removal is atomic
            with contextlib.suppress(FileNotFoundError):  # the run folder was renamed or removed in the meantime
                old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def is_good(path: Path) -> bool:
    """Return whether the checkpoint is marked as GOOD (see `mark`)."""
    return (path / GOOD).exists()


def before_decay(saved: Sequence[Path]) -> Path | None:
    """Return the last of these checkpoints at which the learning rate had not begun to decay; None if there is none. A
    damaged checkpoint counts as not decayed."""

    def decays(path: Path) -> bool:
        try:
            return read_info(path).decays
        except UserError:
            return False

    return next((path for path in reversed(saved) if not decays(path)), None)


def mark(run_dir: Path, step: int, as_what: str, why: str) -> Path | None:
    """Mark the checkpoint of `step` by writing `why` to its file `as_what` (GOOD or FAILED), and return the checkpoint;
    None if there is none. If the file cannot be written, the checkpoint remains unmarked."""
    path = step_folder(run_dir, step)
    if path not in saved_steps(run_dir):
        return None
    with contextlib.suppress(OSError):  # if the disk is full, the checkpoint remains unmarked
        (path / as_what).write_text(why + "\n", encoding="utf-8")
    return path


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, the step from which a run resumes, so that they are not mistaken for
    checkpoints of the resumed run.

    Return their new names.
    """
    moved = []
    for path in saved_steps(run_dir):
        if step_of(path) > step:
            aside = path.with_name(f"aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def read_info(path: Path) -> Info:
    """Return a checkpoint's info. Paths in its config that lie below the run folder are adjusted to the current
    location of this folder. Raises UserError if the checkpoint is damaged."""
    try:
        with open_regular(path / INFO_FILE) as file:
            info = TypeAdapter(Info).validate_json(file.read(), strict=True)
    except (OSError, ValueError) as error:
        raise damaged(path, INFO_FILE, error) from None
    if step_of(path) not in (-1, info.step):
        raise damaged(path, INFO_FILE, f"it belongs to step {info.step}")
    run_dir = path.parent.parent
    return replace(info, config=follow(info.config, run_dir)) if checkpoints_dir(run_dir) == path.parent else info


def open_state(path: Path, rank: int = 0, world: int = 1) -> State:
    """Verify the checksums of a checkpoint's files, with the work split over `world` ranks, and return a reader of its
    tensors. Raises UserError if the checkpoint is damaged or missing."""
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path}: rank {rank} cannot find it; run.dir must be on a file system shared by all nodes"
        )
    sums = read_info(path).sha256
    state_files.check(path, state_files.TABLE_FILE, sums)
    table = state_files.read_table(path)
    for file in state_files.part_files(table.parts)[rank::world]:
        state_files.check(path, file, sums)
    return State(path, table)


def read_weights(path: Path, *, average: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by parameter name: float32, in the shapes of the parameters. For a run with
    train.ema, return their moving average unless `average` is False. Raises UserError if the checkpoint is damaged."""
    state = open_state(path)
    return {name: state.whole(stored) for name, stored in _weight_names(state.shapes, average).items()}


def _weight_names(stored: Iterable[str], average: bool) -> dict[str, str]:
    """Return the name in the state for each parameter name. Buffers have no average."""
    kinds = ("model/", f"{EMA}/") if average else ("model/",)
    names = list(stored)
    return {name.removeprefix(kind): name for kind in kinds for name in names if name.startswith(kind)}


def locate(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the last checkpoint in it if it is a run folder. Raises UserError
    otherwise."""
    if (path / INFO_FILE).is_file():
        return path
    found = saved_steps(path)
    if not found:
        raise UserError(f"{path}: is neither a checkpoint nor a run folder with one")
    return found[-1]


def versions() -> dict[str, str]:
    """Return the versions of m3ae_fast and torch, by package name."""
    return {"m3ae_fast": __version__, "torch": torch.__version__}
