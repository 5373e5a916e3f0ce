"""Loggers in addition to a run's own files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library

WANDB_ID_FILE = "wandb-id"


class Logger(Protocol):
    """A logger of a run, which is created from the run folder, the step from which the run starts, and the config."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one point per scalar. Raises OSError if that fails."""

    def figure(self, step: int, name: str, path: Path) -> None:
        """Add an image file to the log."""

    def close(self) -> None:
        """Write what is buffered, and end the log."""


class TensorBoard:
    """Logger that writes event files to folder/tensorboard."""

    def __init__(self, folder: Path, start_step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logger that writes to Weights & Biases. The run folder contains the id of the run at Weights & Biases, so that a
    resumed run is added to the same log.

    The environment variables WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE set the project, the entity and the mode
    ("offline" requires no account). The constructor raises UserError if wandb is not installed or cannot start.
    """

    def __init__(self, folder: Path, start_step: int, config: dict[str, Any]) -> None:
        wandb = library("wandb", "run.loggers")
        id_file = folder / WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if start_step and id_file.is_file() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "m3ae-fast"),
                name=folder.resolve().name,
                dir=str(folder),
                id=known or None,
                resume="allow",
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, TimeoutError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f'run.loggers: wandb: {reason}; run "wandb login", or set WANDB_MODE=offline') from None
        id_file.write_text(self._run.id + "\n", encoding="utf-8")
        self._image: Callable[..., Any] = wandb.Image
        # the x-axis is the step of training and not wandb's own counter, because a resumed run logs some steps again
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def figure(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._image(str(path))})

    def close(self) -> None:
        self._run.finish()


def show(folder: Path, loggers: Sequence[str], step: int, name: str, path: Path) -> None:
    """Add a figure to the logs of a run that has ended. Raises UserError if a logger cannot continue."""
    for logger in loggers:
        writer = LOGGERS[logger](folder, step, {})
        writer.figure(step, name, path)
        writer.close()


LOGGERS: dict[str, Callable[[Path, int, dict[str, Any]], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
