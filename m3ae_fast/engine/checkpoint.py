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
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3ae_fast.config import Config
from m3ae_fast.errors import UserError

STATE_FILE, INFO_FILE = "state.safetensors", "state.json"


@dataclass
class Info:
    """What a checkpoint knows beside its tensors."""

    step: int  # optimiser steps taken
    samples: int  # samples seen: the data position
    seed: int
    config: dict[str, Any]
    versions: dict[str, str]


def folder(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def saved_steps(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder(run_dir).glob("step-*") if (p / INFO_FILE).is_file() and (p / STATE_FILE).is_file())


def save(run_dir: Path, state: dict[str, Tensor], info: Info, keep: int) -> Path:
    """Write a checkpoint beside the others and only then give it its name; older ones than the last `keep` go.

    Raises:
        UserError: the disk refuses; the earlier checkpoints are as they were.
    """
    target = folder(run_dir) / f"step-{info.step:08d}"
    if target in saved_steps(run_dir):
        return target
    partial = folder(run_dir) / f".writing-{info.step:08d}-{os.getpid()}"
    try:
        for leftover in folder(run_dir).glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(state, partial / STATE_FILE)
        (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
        for path in (partial / STATE_FILE, partial / INFO_FILE, partial):
            _to_disk(path)
        partial.rename(target)
        _to_disk(folder(run_dir))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint {target}: cannot be written ({error}); the earlier ones are intact") from None
    for old in saved_steps(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_info(path: Path) -> Info:
    """Raises UserError where the checkpoint is damaged."""
    try:
        return Info(**json.loads((path / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path}: {INFO_FILE} is damaged ({error}); remove the folder to use an older one"
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
            return file.get_tensor(name)
        except SafetensorError:
            raise UserError(f"checkpoint {path}: has no tensor {name}; is it of another model config?") from None

    return get


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's own tensors of a checkpoint. Raises UserError where it is damaged."""
    get = open_state(path)
    with safe_open(path / STATE_FILE, framework="pt") as file:
        return weights({name: get(name) for name in file.keys() if name.startswith("model/")})  # noqa: SIM118


def check_fits(path: Path, info: Info, config: Config) -> None:
    """Raises UserError where going on from the checkpoint under `config` would not be the same run."""
    saved, wanted = info.config, config.model_dump(mode="json")
    same = [("model", key) for key in wanted["model"]] + [("run", "seed"), ("train", "global_batch")]
    for section, key in same:
        was, now = saved.get(section, {}).get(key), wanted[section][key]
        if was != now:
            raise UserError(f"checkpoint {path}: was made with {section}.{key} = {was}, the config says {now}")


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors of a state, by parameter name."""
    return {name.removeprefix("model/"): t for name, t in state.items() if name.startswith("model/")}


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: "auto" (the last one, if any), "no", or a path (a checkpoint, or a run).

    Raises:
        UserError: the path holds no checkpoint, or a run that must not be resumed already has checkpoints.
    """
    if resume == "no":
        if saved_steps(run_dir):
            raise UserError(
                f"{run_dir} already holds checkpoints; add --resume auto to go on, or choose another run.dir"
            )
        return None
    if resume == "auto":
        return next(reversed(saved_steps(run_dir)), None)
    path = Path(resume)
    if (path / INFO_FILE).is_file():
        return path
    found = saved_steps(path)
    if not found:
        raise UserError(f"--resume {resume}: neither a checkpoint nor a run folder with one")
    return found[-1]


def versions() -> dict[str, str]:
    import m3ae_fast

    return {"m3ae_fast": m3ae_fast.__version__, "torch": torch.__version__}
