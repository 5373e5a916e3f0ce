"""Checkpoints that are whole or not there, and that fit any number of ranks and any ZeRO stage.

run.dir/checkpoints/step-00001234/
    state.safetensors   float32 weights and Adam moments, whole tensors by parameter name
    state.json          step, samples seen, seeds, config, versions

M3AE models are at most a few billion bytes, so one rank writes one file: simpler than a file a rank, and resuming on
another number of ranks or another ZeRO stage needs no conversion.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3ae_fast.errors import UserError

STATE_FILE, INFO_FILE = "state.safetensors", "state.json"


@dataclass
class Info:
    """What a checkpoint knows beside its tensors."""

    step: Annotated[int, Field(ge=0, lt=1 << 53)]  # optimiser steps taken
    samples: Annotated[int, Field(ge=0)]  # samples seen: the data position
    seed: int
    config: dict[str, dict[str, Any] | None]
    versions: dict[str, str]


def folder(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells, -1 for any other name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def saved_steps(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    whole = (p for p in folder(run_dir).glob("step-*") if (p / INFO_FILE).is_file() and (p / STATE_FILE).is_file())
    return sorted((p for p in whole if step_of(p) >= 0), key=step_of)


def save(run_dir: Path, state: dict[str, Tensor], info: Info, keep: int, *, section: str = "optim") -> Path:
    """Write a checkpoint beside the others and only then give it its name; older ones than the last `keep` go.
    `section` of the config is where the optimiser is set.

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
                f"lower {section}.peak_lr, or set {section}.clip_grad"
            )
    partial = folder(run_dir) / f".writing-{info.step:08d}-{os.getpid()}"
    try:
        for leftover in (*folder(run_dir).glob(".writing-*"), *folder(run_dir).glob(".removing-*"), target):
            shutil.rmtree(leftover, ignore_errors=True)  # of a save or a removal that was killed
        partial.mkdir(parents=True)
        save_file(state, partial / STATE_FILE)
        (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
        shutil.copymode(partial / INFO_FILE, partial / STATE_FILE)  # safetensors would let nobody else read it
        for path in (partial / STATE_FILE, partial / INFO_FILE, partial):
            _to_disk(path)
        partial.rename(target)
        _to_disk(folder(run_dir))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint {target}: cannot be written ({error}); the earlier ones are intact") from None
    for old in saved_steps(run_dir)[:-keep]:
        removed = old.with_name(f".removing-{old.name}")  # renamed first: it is whole or not there
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
    return target


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, from which a run goes on, so that none is taken for one of its own.

    Returns their new names.
    """
    moved = []
    for path in saved_steps(run_dir):
        if step_of(path) > step:
            aside = path.with_name(f"aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_info(path: Path) -> Info:
    """Raises UserError where the checkpoint is damaged."""
    try:
        return TypeAdapter(Info).validate_json((path / INFO_FILE).read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]  # pydantic's has several lines
        raise UserError(
            f"checkpoint {path}: {INFO_FILE} is damaged ({reason}); remove the folder to use an older one"
        ) from None


def open_state(path: Path) -> Callable[[str], Tensor]:
    """A reader of single tensors by name. Raises UserError where the file is damaged, or later where it lacks one."""
    try:
        file = safe_open(path / STATE_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path}: {STATE_FILE} is damaged ({error}); remove the folder to use an older one"
        ) from None

    def get(name: str) -> Tensor:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError:
            raise UserError(f"checkpoint {path}: has no tensor {name}; is it of another model config?") from None
        if not tensor.isfinite().all():
            raise UserError(f"checkpoint {path}: {name} is not finite; remove the folder to use an older one")
        return tensor

    return get


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's own tensors of a checkpoint. Raises UserError where it is damaged."""
    get = open_state(path)
    with safe_open(path / STATE_FILE, framework="pt") as file:
        return weights({name: get(name) for name in file.keys() if name.startswith("model/")})  # noqa: SIM118


def check_fits(path: Path, info: Info, wanted: dict[str, Any], same: Iterable[tuple[str, str]]) -> None:
    """Raises UserError where going on from the checkpoint would not be the same run: where it and the `wanted` sections
    differ in a `same` (section, key)."""
    for section, key in same:
        was, now = (info.config.get(section) or {}).get(key), wanted[section][key]
        if was != now:
            raise UserError(f"checkpoint {path}: was made with {section}.{key} = {was}, the config says {now}")


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors of a state, by parameter name."""
    return {name.removeprefix("model/"): t for name, t in state.items() if name.startswith("model/")}


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: "auto" (the last one, if any), "no", or a path for `locate`.

    Raises:
        UserError: the path holds no checkpoint, or `run_dir` holds those of another run.
    """
    own = saved_steps(run_dir)
    if resume == "auto":
        return own[-1] if own else None
    path = None if resume == "no" else locate(Path(resume))
    if own and (path is None or path.resolve() not in [p.resolve() for p in own]):
        raise UserError(f"{run_dir} already holds checkpoints; add --resume auto to go on, or choose another run.dir")
    return path


def locate(path: Path) -> Path:
    """`path` itself where it is a checkpoint, the last one where it is a run folder. Raises UserError for others."""
    if (path / INFO_FILE).is_file():
        return path
    found = saved_steps(path)
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with one")
    return found[-1]


def versions() -> dict[str, str]:
    import m3ae_fast

    return {"m3ae_fast": m3ae_fast.__version__, "torch": torch.__version__}
