"""The log of a run, written by the main rank: a progress bar, metrics.jsonl, and loggers such as TensorBoard.

`metrics_line.py` computes the values of a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import METRICS_FILE, metrics_lines
from m3ae_fast.training.loggers import LOGGERS, Logger


class _Console(Console):
    """A console that ignores broken pipes (as with `| head`); rich's own console would end the run."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


@dataclass
class RunLog:
    """The log of a run. Use as a context manager around the training loop. Nothing is written before `begin`."""

    folder: Path
    start: int  # number of steps taken before the run was resumed; 0 for a new run
    total: int  # number of steps of the run
    loggers: Sequence[str] = ("tensorboard",)  # names in `LOGGERS`
    config: dict[str, Any] = field(default_factory=dict)  # config that the loggers show

    def __post_init__(self) -> None:
        self._file: BinaryIO | None = None
        self._opened: list[Logger] = []
        self._written = True
        self._left = ""  # time left, after the first step
        self.console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=self.total, completed=self.start, summary="", left="")

    def __enter__(self) -> RunLog:
        self._old_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._close()
        threading.excepthook = self._old_hook

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Prevent TensorBoard's thread from printing a traceback for a write error, which `log` reports anyway."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            self._old_hook(args)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # `log` reports the error
            for logger in self._opened:
                logger.close()
        if self._file is not None:
            self._file.close()
        self._file, self._opened = None, []

    def begin(self) -> None:
        """Start the log. If the run is resumed, log lines of steps after the step of the checkpoint are removed. Raises
        UserError if the folder cannot be written to or a logger cannot start."""
        self._open()

    def _open(self) -> None:
        if self._file is not None:
            return
        path = self.folder / METRICS_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _forget_after(path, self.start)
            self._file = path.open("ab", buffering=0)
            for name in self.loggers:
                self._opened.append(LOGGERS[name](self.folder, self.start, self.config))
        except OSError as error:
            raise UserError(f"run.dir {self.folder}: cannot be written to ({error.strerror or error})") from None

    def change(self, total: int) -> None:
        """Set the new total number of steps."""
        self.total = total
        self._progress.update(self._task, total=total)

    def advance(self, step: int, left: float) -> None:
        """Set the number of steps taken and the seconds left, which the progress bar shows."""
        self._left = str(timedelta(seconds=round(left)))
        self._progress.update(self._task, completed=step, left=self._left)

    def log(self, step: int, values: dict[str, Any], where: Mapping[str, str] | None = None) -> None:
        """Write one JSON line, one point per scalar to the loggers, and one line on the console. If the disk is full,
        only the console line is written. The run continues, because its checkpoints may be on another disk. `where`:
        name of the node for values of a single rank. Raises UserError if the file was deleted and cannot be created
        again."""
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self.print(f"{self.folder / METRICS_FILE} was deleted during the run; its contents are lost")
            self._close()
        self._open()
        assert self._file is not None
        with self._while_writable():
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            for logger in self._opened:
                logger.log(step, values)
        self._progress.update(self._task, summary=_summary(values))
        shown = [
            f"{name} {_short(value)}" + (f" (on {where[name]})" if where and name in where else "")
            for name, value in values.items()
        ]
        if "loss" in values and not self.console.is_terminal:  # on a terminal, the progress bar shows the time left
            shown.append(f"eta {self._left}")
        self.print("  ".join([f"step {step}", *shown]))

    def has(self, step: int, names: Collection[str]) -> bool:
        """Return whether the log has a line for this step with any of these names, even if it was written before the
        run was resumed."""
        with contextlib.suppress(OSError):
            lines = metrics_lines(self.folder / METRICS_FILE)
            return any(line["step"] == step and not line.keys().isdisjoint(names) for line in lines)
        return False

    def figure(self, step: int, name: str, path: Path) -> None:
        """Add an image file to the loggers."""
        with self._while_writable():
            for logger in self._opened:
                logger.figure(step, name, path)

    @contextlib.contextmanager
    def _while_writable(self) -> Iterator[None]:
        """Enter a context in which write errors are not raised; the first one is reported."""
        try:
            yield
        except OSError as error:
            if self._written:
                self.print(f"metrics can no longer be written ({error.strerror or error})")
            self._written = False

    def print(self, text: str) -> None:
        """Print text on the console, above the progress bar."""
        with contextlib.suppress(OSError):  # output redirected to a file on a full disk
            self._progress.console.print(text)


class SilentLog(RunLog):
    """The log of the other ranks, which prints and writes nothing."""

    _nothing: Any = staticmethod(lambda *_, **__: None)
    __init__ = __exit__ = begin = change = advance = log = has = figure = print = _nothing

    def __enter__(self) -> SilentLog:
        return self


def _summary(values: dict[str, Any]) -> str:
    shown = {"loss": "loss {:.4f}", "samples_per_s": "{:.1f} samples/s", "data_wait": "data wait {:.1%}"}
    return "  ".join(form.format(values[name]) for name, form in shown.items() if name in values)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines after `step`, from which a resumed run starts, and an incomplete last line. For a new run,
    remove all lines."""
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in metrics_lines(path) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    put_in_place(partial, path)
