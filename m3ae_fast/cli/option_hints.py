"""Hints for options that other programs have, but `pretrain` and `train` do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m3ae_fast.config import Config
from m3ae_fast.config.messages import settings_called
from m3ae_fast.pretraining import SEVERAL_RANKS

# Settings by the names that they have in other programs.
_SETTINGS = {
    "arch": "model.size",
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "embed_dim": "model.emb_dim",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "learning_rate": "optim.peak_lr",
    "lr": "optim.peak_lr",
    "mask_ratio": "masking.image_ratio",
    "max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "model": "model.size",
    "num_epochs": "train.epochs",
    "num_workers": "data.workers",
}
_GPUS = ("devices", "gpus", "nproc_per_node", "num_gpus")
# Advice for the other options of other programs, by the program to which they were given.
_OTHERWISE = {
    "pretrain": {
        **dict.fromkeys(
            ("data", "data_dir", "data_path", "dataset", "source", "train"), "give SOURCE without an option"
        ),
        **dict.fromkeys(("output", "output_dir"), "use --out"),
        **dict.fromkeys(_GPUS, SEVERAL_RANKS),
        "config": "use m3ae-fast train --config",
        "resume": "the same command again resumes",
        "init_from": "use --from",
        "model": "use --set model.size=base or, to start from the weights of a model, --from MODEL",
    },
    "train": {
        **dict.fromkeys(("data", "data_dir", "data_path", "dataset", "source"), "use --train SHARDS"),
        **dict.fromkeys(("output", "output_dir"), "use --out"),
        **dict.fromkeys(_GPUS, "use torchrun --nproc-per-node N -m m3ae_fast train"),
        "captions": "captions are in the shards: use m3ae-fast shards make --captions",
        "from": "use --set model.init_from=MODEL",
    },
}


def hint(program: str, unknown: Sequence[str]) -> str:
    """Return advice on what to use in place of the first unrecognised argument of a program; "" if there is none.
    `program`: the program as it was called; `unknown`: its unrecognised arguments, such as ["--epochs", "10"]."""
    first, *rest = unknown
    program = Path(program.split()[-1]).stem
    if program not in _OTHERWISE or not first.startswith("--"):
        return ""
    option, _, value = first.partition("=")
    name = option.lstrip("-").replace("-", "_").lower()
    if name in _OTHERWISE[program]:
        return _OTHERWISE[program][name]
    found = [_SETTINGS[name]] if name in _SETTINGS else settings_called(Config, name)
    if not found:
        return ""
    value = value or next((word for word in rest[:1] if not word.startswith("--")), "VALUE")
    return f"use {' or '.join(f'--set {setting}={value}' for setting in found)}"
