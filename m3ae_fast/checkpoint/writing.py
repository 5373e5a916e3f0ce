"""Writing of a checkpoint by all ranks. Each rank writes its part of the state to a temporary folder. When all ranks
have written, rank 0 renames the folder to its final name."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError

from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.errors import UserError, attempt
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.checkpoint import state_files
from m3ae_fast.checkpoint.folder import INFO_FILE, Info, prune, saved_steps, step_folder, step_of
from m3ae_fast.engine.fragments import Fragments
from m3ae_fast.process.agreement import Agreement

ALONE = Agreement(0, 1, dist.HashStore(), threading.Event())


def save(
    run_dir: Path,
    part: Fragments,
    info: Info,
    keep: int,
    suggested_fix: str = "a lower optim.peak_lr",
    ranks: Agreement = ALONE,
) -> Path:
    """Write a checkpoint to a temporary folder, rename the folder, call `prune`, and return the checkpoint's path. If
    the checkpoint already exists, nothing is written. Every rank must call this function.

    Args:
        run_dir: the run folder, on a file system shared by all ranks.
        part: this rank's part of the state, on the CPU; the complete state if there is one rank.
        info: further content of the checkpoint; the value on rank 0 is stored.
        keep: number of checkpoints to keep.
        suggested_fix: the fix that the error message suggests if a tensor is not finite.
        ranks: agreement between all ranks.

    Raises:
        UserError: raised on every rank if a tensor is not finite, a file cannot be written, or a part is missing. The
            earlier checkpoints are unchanged.
    """
    target = step_folder(run_dir, info.step)
    for last in (False, True):
        unfinished = ranks.decide("", lambda _: _begin(target))
        if not unfinished:
            return target
        job = _Save(Path(unfinished), target, part, info, suggested_fix, ranks.world)
        report, bug = job.write(ranks.rank)
        try:
            if ranks.decide(report, partial(job.end, last=last)):
                break
        except UserError:
            if bug is not None:  # a bug ends this rank with its traceback
                raise bug from None
            raise
    if ranks.rank == 0:
        prune(run_dir, keep)
    return target


def _begin(target: Path) -> str:
    """Create the temporary folder and return it; return "" if the checkpoint already exists. Rank 0 only."""
    if target in saved_steps(target.parents[1]):
        return ""
    unfinished = target.parent / f".writing-{step_of(target):08d}-{os.getpid()}"
    for leftover in (*target.parent.glob(".writing-*"), *target.parent.glob(".removing-*"), target):
        shutil.rmtree(leftover, ignore_errors=True)  # left by a killed save or removal
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise _unwritten(target, error) from None
    return str(unfinished)


def _unwritten(target: Path, error: object) -> UserError:
    return UserError(f"checkpoint {target}: cannot be written ({error}); the earlier checkpoints are intact")


class _Save(NamedTuple):
    """One attempt to write a checkpoint, with the arguments of `save`."""

    unfinished: Path
    target: Path
    part: Fragments
    info: Info
    suggested_fix: str
    world: int

    def write(self, rank: int) -> tuple[str, BaseException | None]:
        """Write this rank's part. Return a pair. Its first item is a JSON object with the checksum or, if the part
        was not written, the reason. Its second item is the error if the error is a bug, otherwise None."""
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
                    f"checkpoint {self.target}: not written, because {name} is not finite; the earlier checkpoints "
                    f"are intact: resume with {self.suggested_fix}"
                )

    def end(self, reports: list[str], last: bool) -> str:
        """Rename the checkpoint to its final name if all ranks have written, and return "saved". Return "" if the
        folder has been renamed or removed in the meantime and this is not the `last` attempt. Rank 0 only.
        """
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
        shapes = {name: piece.shape for name, piece in self.part.items()}
        sums[state_files.TABLE_FILE] = state_files.write_table(self.unfinished, shapes, self.world)
        info = json.dumps(asdict(replace(self.info, sha256=sums)), indent=2)
        (self.unfinished / INFO_FILE).write_text(info + "\n", encoding="utf-8")
        for file in sums:  # safetensors creates files that only their owner can read
            shutil.copymode(self.unfinished / INFO_FILE, self.unfinished / file)
        put_in_place(self.unfinished, self.target)
