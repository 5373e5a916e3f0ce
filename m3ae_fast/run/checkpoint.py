"""Checkpoints that are whole or not there, and that fit any number of ranks and any ZeRO stage.

run.dir/checkpoints/step-00001234/
    state.safetensors   float32 weights, Adam moments and, with train.ema, averaged weights: whole tensors by name
    state.json          step, samples seen, seeds, config, versions, the data's fingerprint, checksums of other files
    good                a loss computed from its weights was finite
    failed              one was not: `--resume auto` skips it

M3AE models are at most a few billion bytes, so one rank writes one file: simpler than a file per rank, and resuming on
another number of ranks or another ZeRO stage needs no conversion.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3ae_fast.engine.optimizer import EMA
from m3ae_fast.errors import UserError
from m3ae_fast.regular_file import open_regular
from m3ae_fast.whole_file import put_in_place

STATE_FILE, INFO_FILE = "state.safetensors", "state.json"
GOOD, FAILED = "good", "failed"


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


def folder(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, -1 for any other name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def saved_steps(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    whole = (p for p in folder(run_dir).glob("step-*") if (p / INFO_FILE).is_file() and (p / STATE_FILE).is_file())
    return sorted((p for p in whole if step_of(p) >= 0), key=step_of)


def save(run_dir: Path, state: dict[str, Tensor], info: Info, keep: int, remedy: str = "a lower optim.peak_lr") -> Path:
    """Write a checkpoint beside the others and only then give it its name; then `prune`. `remedy`: settings that may
    help where a tensor is not finite.

    Raises:
        UserError: a tensor is not finite, or the disk refuses; the earlier checkpoints are as they were.
    """
    target = folder(run_dir) / f"step-{info.step:08d}"
    if target in saved_steps(run_dir):
        return target
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"checkpoint {target}: not written, since {name} is not finite; the earlier ones are intact: "
                f"go on with {remedy}"
            )
    partial = folder(run_dir) / f".writing-{info.step:08d}-{os.getpid()}"
    try:
        try:
            _write(partial, target, state, info)
        except (OSError, SafetensorError):
            if partial.exists():
                raise
            _write(partial, target, state, info)  # the run's folder was renamed or removed meanwhile
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint {target}: cannot be written ({error}); the earlier ones are intact") from None
    prune(run_dir, keep)
    return target


def _write(partial: Path, target: Path, state: dict[str, Tensor], info: Info) -> None:
    for leftover in (*target.parent.glob(".writing-*"), *target.parent.glob(".removing-*"), target):
        shutil.rmtree(leftover, ignore_errors=True)  # of a save or a removal that was killed
    partial.mkdir(parents=True)
    save_file(state, partial / STATE_FILE)
    info = replace(info, sha256={STATE_FILE: _sha256(partial / STATE_FILE)})
    (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    shutil.copymode(partial / INFO_FILE, partial / STATE_FILE)  # safetensors makes it readable only to its owner
    put_in_place(partial, target)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the last one that is known to be good."""
    saved = saved_steps(run_dir)
    good = [path for path in saved if is_good(path)][-1:]
    for old in saved[:-keep]:
        if old not in good:
            removed = old.with_name(f".removing-{old.name}")  # renamed first: it is whole or not there
            with contextlib.suppress(FileNotFoundError):  # the run's folder was renamed or removed meanwhile
                old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def is_good(path: Path) -> bool:
    return (path / GOOD).exists()


def mark(run_dir: Path, step: int, as_what: str, why: str) -> Path | None:
    """Note that the checkpoint of `step` is GOOD or has FAILED. Returns it, None where there is none."""
    path = folder(run_dir) / f"step-{step:08d}"
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(path: Path, file: str, error: object) -> UserError:
    reason = " ".join(str(error).split())[:200]  # pydantic's has several lines
    return UserError(f"checkpoint {path}: {file} is damaged ({reason}); remove the folder to use an older one")


def read_info(path: Path) -> Info:
    """Read a checkpoint's info. Raises UserError if it is damaged."""
    try:
        with open_regular(path / INFO_FILE) as file:
            info = TypeAdapter(Info).validate_json(file.read(), strict=True)
    except (OSError, ValueError) as error:
        raise _damaged(path, INFO_FILE, error) from None
    if step_of(path) not in (-1, info.step):
        raise _damaged(path, INFO_FILE, f"it is of step {info.step}")
    return info


def open_state(path: Path) -> Callable[[str], Tensor]:
    """Open a reader of single tensors by name. Raises UserError if the file is damaged, or later if it lacks one."""
    file = _open_state(path)

    def get(name: str) -> Tensor:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError:
            raise _lacks(path, name) from None
        if not tensor.isfinite().all():
            raise UserError(f"checkpoint {path}: {name} is not finite; remove the folder to use an older one")
        return tensor

    return get


def _open_state(path: Path) -> Any:
    expected = read_info(path).sha256.get(STATE_FILE)
    try:
        if expected not in (None, _sha256(path / STATE_FILE)):
            raise OSError("its checksum is not the one it was written with")
    except OSError as error:
        raise _damaged(path, STATE_FILE, error) from None
    return _tensors(path)


def _tensors(path: Path) -> Any:
    try:
        open_regular(path / STATE_FILE).close()  # safetensors would wait for a pipe
        return safe_open(path / STATE_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, STATE_FILE, error) from None


def _lacks(path: Path, name: str) -> UserError:
    return UserError(f"checkpoint {path}: has no tensor {name}; is it of another model config?")


def check_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError if the state lacks a tensor of `shapes`, or has it with another shape or not in float32."""
    with _tensors(path) as file:
        names = set(file.keys())
        for name, shape in shapes.items():
            if name not in names:
                raise _lacks(path, name)
            part = file.get_slice(name)
            if (found := tuple(part.get_shape())) != shape or part.get_dtype() != "F32":
                raise UserError(
                    f"checkpoint {path}: {name} is {part.get_dtype()} {list(found)}, the model needs F32 {list(shape)}"
                )


def read_weights(path: Path, *, average: bool = True) -> dict[str, Tensor]:
    """Return float32 weights of a checkpoint by parameter name; of a run with train.ema their moving average, unless
    `average` is false. Raises UserError if it is damaged."""
    get = open_state(path)
    with _tensors(path) as file:
        chosen = _weight_names(file.keys(), average)
    return {name: get(stored) for name, stored in chosen.items()}


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the last weights in a state, by parameter name."""
    return {name: state[stored] for name, stored in _weight_names(state, average=False).items()}


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
    import m3ae_fast

    return {"m3ae_fast": m3ae_fast.__version__, "torch": torch.__version__}
