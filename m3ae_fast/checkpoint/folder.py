"""Checkpoints that are whole or not there, and that fit any number of ranks and any ZeRO stage.

run.dir/checkpoints/step-00001234/
    state*.safetensors  float32 weights, Adam moments and, with train.ema, averaged weights: see `parts`
    state.json          step, samples seen, seeds, config, versions, the data's fingerprint, checksums of other files
    good                a loss computed from its weights was finite
    failed              one was not: `--resume auto` skips it

Each rank writes what it keeps; when all have, rank 0 gives the folder its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from m3ae_kernels.version import __version__
from pydantic import AfterValidator, Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.errors import UserError, attempt
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.checkpoint import state_files
from m3ae_fast.checkpoint.state_files import ANY_PART, State, damaged
from m3ae_fast.config import follow
from m3ae_fast.engine.fragments import Fragments
from m3ae_fast.engine.optimizer import EMA
from m3ae_fast.process.agreement import Agreement

INFO_FILE = "state.json"
GOOD, FAILED = "good", "failed"
ALONE = Agreement(0, 1, dist.HashStore(), threading.Event())


def _later(change: tuple[int, int]) -> tuple[int, int]:
    """Check a change of the number of steps. Raises ValueError if that is not larger than the steps taken before."""
    step, total = change
    if not 0 <= step < total:
        raise ValueError(f"a run of {total} steps after {step} steps")
    return change


@dataclass
class Info:
    """What a checkpoint holds besides its tensors."""

    step: Annotated[int, Field(ge=0, lt=1 << 53)]  # optimiser steps taken
    samples: Annotated[int, Field(ge=0)]  # samples seen: the data position
    seed: int
    config: dict[str, dict[str, Any] | None]
    versions: dict[str, str]
    stream: dict[str, str] = field(default_factory=dict)  # what data it was trained on: `data.fingerprint`
    sha256: dict[str, str] = field(default_factory=dict)  # by file
    attention: dict[str, str] = field(default_factory=dict)  # on GPUs: the kernel that was chosen, by part
    changes: list[Annotated[tuple[int, int], AfterValidator(_later)]] = field(default_factory=list)  # of its `Schedule`
    decays: bool = False  # whether the learning rate has begun to fall, with a schedule that can be extended
    spent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # seconds, where the run has a time limit
    # batches of the stream that are left out, of which the first is 0
    left_out: list[Annotated[int, Field(ge=0, lt=1 << 53)]] = field(default_factory=list)


def checkpoints_dir(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, -1 for any other name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def saved_steps(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    steps = (p for p in checkpoints_dir(run_dir).glob("step-*") if (p / INFO_FILE).is_file() and any(p.glob(ANY_PART)))
    return sorted((p for p in steps if step_of(p) >= 0), key=step_of)


def save(
    run_dir: Path,
    part: Fragments,
    info: Info,
    keep: int,
    remedy: str = "a lower optim.peak_lr",
    ranks: Agreement = ALONE,
) -> Path:
    """Write a checkpoint beside the others and only then give it its name; then `prune`. Every rank must call it.

    Args:
        run_dir: on a file system that all ranks see.
        part: of the state, on the CPU; all of it where there is one rank.
        info: what else is stored; rank 0's counts.
        keep: checkpoints that stay.
        remedy: settings that may help where a tensor is not finite.
        ranks: all that have a part.

    Raises:
        UserError: on every rank, where a tensor is not finite, the disk refuses, or a part is missing; the earlier
            checkpoints are as they were.
    """
    target = checkpoints_dir(run_dir) / f"step-{info.step:08d}"
    for last in (False, True):
        unfinished = ranks.decide("", lambda _: _begin(target))
        if not unfinished:
            return target
        job = _Save(Path(unfinished), target, part, info, remedy, ranks.world)
        report, bug = job.write(ranks.rank)
        try:
            if ranks.decide(report, partial(job.end, last=last)):
                break
        except UserError:
            if bug is not None:  # which ends this rank, with its traceback
                raise bug from None
            raise
    if ranks.rank == 0:
        prune(run_dir, keep)
    return target


def _begin(target: Path) -> str:
    """Make the folder to write to, and return it; "" if the checkpoint is there. Rank 0 only."""
    if target in saved_steps(target.parents[1]):
        return ""
    unfinished = target.parent / f".writing-{step_of(target):08d}-{os.getpid()}"
    for leftover in (*target.parent.glob(".writing-*"), *target.parent.glob(".removing-*"), target):
        shutil.rmtree(leftover, ignore_errors=True)  # of a save or a removal that was killed
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise _unwritten(target, error) from None
    return str(unfinished)


def _unwritten(target: Path, error: object) -> UserError:
    return UserError(f"checkpoint {target}: cannot be written ({error}); the earlier ones are intact")


class _Save(NamedTuple):
    """One attempt to write a checkpoint; arguments as of `save`."""

    unfinished: Path
    target: Path
    part: Fragments
    info: Info
    remedy: str
    world: int

    def write(self, rank: int) -> tuple[str, BaseException | None]:
        """Write this rank's part. Return, as JSON, its checksum or why there is none; and the error if it is a bug."""
        checksum, error = attempt(lambda: self._write(rank))
        if error is None:
            return json.dumps({"sha256": checksum}), None
        if isinstance(error, UserError):
            return json.dumps({"error": str(error)}), None
        who = f"rank {rank}: " if self.world > 1 else ""
        refused = isinstance(error, (OSError, SafetensorError))
        kind = "" if refused else f"{type(error).__name__}: "
        report = json.dumps({"error": str(_unwritten(self.target, f"{who}{kind}{error}"))})
        return report, None if refused or out_of_memory(error) else error

    def _write(self, rank: int) -> str:
        self._check_finite()
        return state_files.write_part(self.unfinished, self.part, rank, self.world)

    def _check_finite(self) -> None:
        for name, piece in self.part.items():
            if not piece.data.isfinite().all():
                raise UserError(
                    f"checkpoint {self.target}: not written, since {name} is not finite; the earlier ones are intact: "
                    f"go on with {self.remedy}"
                )

    def end(self, reports: list[str], last: bool) -> str:
        """Give the checkpoint its name, if all have written. Rank 0 only. Return "" if the folder was renamed or
        removed meanwhile and this was not the `last` attempt."""
        try:
            self._end([json.loads(report) for report in reports])
        except (UserError, OSError) as error:
            if not (last or self.unfinished.exists()):
                return ""
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise error if isinstance(error, UserError) else _unwritten(self.target, error) from None
        return "saved"

    def _end(self, reports: list[dict[str, str]]) -> None:
        for report in reports:
            if "error" in report:
                raise UserError(report["error"])
        sums = dict(zip(state_files.part_files(self.world), (report["sha256"] for report in reports)))
        if self.world > 1:
            shapes = {name: piece.shape for name, piece in self.part.items()}
            sums[state_files.TABLE_FILE] = state_files.write_table(self.unfinished, shapes, self.world)
        info = json.dumps(asdict(replace(self.info, sha256=sums)), indent=2)
        (self.unfinished / INFO_FILE).write_text(info + "\n", encoding="utf-8")
        for file in sums:  # safetensors makes its files readable only to their owner
            shutil.copymode(self.unfinished / INFO_FILE, self.unfinished / file)
        put_in_place(self.unfinished, self.target)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`, the last one that is known to be good, and the last one before the
    learning rate fell, from which a run can be extended."""
    saved = saved_steps(run_dir)
    kept = [*[path for path in saved if is_good(path)][-1:], before_decay(saved)]
    for old in saved[:-keep]:
        if old not in kept:
            removed = old.with_name(f".removing-{old.name}")  # renamed first: it is whole or not there
            with contextlib.suppress(FileNotFoundError):  # the run's folder was renamed or removed meanwhile
                old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def is_good(path: Path) -> bool:
    return (path / GOOD).exists()


def before_decay(saved: Sequence[Path]) -> Path | None:
    """Return the last of these checkpoints whose learning rate had not begun to fall, if that of the last one had; else
    the last. None if there is none. One that is damaged counts as if its rate had not."""

    def decays(path: Path) -> bool:
        try:
            return read_info(path).decays
        except UserError:
            return False

    return next((path for path in reversed(saved) if not decays(path)), None)


def mark(run_dir: Path, step: int, as_what: str, why: str) -> Path | None:
    """Note that the checkpoint of `step` is GOOD or has FAILED. Returns it, None if there is none."""
    path = checkpoints_dir(run_dir) / f"step-{step:08d}"
    if path not in saved_steps(run_dir):
        return None
    with contextlib.suppress(OSError):  # a full disk: the checkpoint stays unmarked
        (path / as_what).write_text(why + "\n", encoding="utf-8")
    return path


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, from which a run goes on, so that none is mistaken for one of its own.

    Returns their new names.
    """
    moved = []
    for path in saved_steps(run_dir):
        if step_of(path) > step:
            aside = path.with_name(f"aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def read_info(path: Path) -> Info:
    """Read a checkpoint's info, in whose config paths below the run folder lead to where that is now. Raises UserError
    if it is damaged."""
    try:
        with open_regular(path / INFO_FILE) as file:
            info = TypeAdapter(Info).validate_json(file.read(), strict=True)
    except (OSError, ValueError) as error:
        raise damaged(path, INFO_FILE, error) from None
    if step_of(path) not in (-1, info.step):
        raise damaged(path, INFO_FILE, f"it is of step {info.step}")
    run_dir = path.parent.parent
    return replace(info, config=follow(info.config, run_dir)) if checkpoints_dir(run_dir) == path.parent else info


def open_state(path: Path, rank: int = 0, world: int = 1) -> State:
    """Open a checkpoint's tensors, after a look at the checksums of its files; `world` ranks share that work. Raises
    UserError if it is damaged, or not there."""
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path}: rank {rank} cannot find it; run.dir must be on a file system shared by all nodes"
        )
    sums, table = read_info(path).sha256, None
    if state_files.TABLE_FILE in sums:
        state_files.check(path, state_files.TABLE_FILE, sums)
        table = state_files.read_table(path)
    for file in state_files.part_files(table.parts if table else 1)[rank::world]:
        state_files.check(path, file, sums)
    return State(path, table)


def read_weights(path: Path, *, average: bool = True) -> dict[str, Tensor]:
    """Return float32 weights of a checkpoint by parameter name; of a run with train.ema their moving average, unless
    `average` is false. Raises UserError if it is damaged."""
    state = open_state(path)
    return {name: state.whole(stored) for name, stored in _weight_names(state.shapes, average).items()}


def _weight_names(stored: Iterable[str], average: bool) -> dict[str, str]:
    """Return parameter name -> its name in a state. Buffers have no average."""
    kinds = ("model/", f"{EMA}/") if average else ("model/",)
    names = list(stored)
    return {name.removeprefix(kind): name for kind in kinds for name in names if name.startswith(kind)}


def locate(path: Path) -> Path:
    """Return `path` itself if it is a checkpoint, the last one of it if it is a run folder. Raises UserError for
    others."""
    if (path / INFO_FILE).is_file():
        return path
    found = saved_steps(path)
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with one")
    return found[-1]


def versions() -> dict[str, str]:
    return {"m3ae_fast": __version__, "torch": torch.__version__}
