"""Measurements in processes of their own, with a time limit. A kernel that crashes or hangs on a GPU then does not
affect the other benchmarks."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from m3ae_kernels.tuning import limited_process

from benchmarks import workload

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0


def measured(function: Callable[[str], T], argument: str) -> T:
    """Return `function(argument)`. On a GPU, the function runs in a process of its own; see `apart`."""
    return apart(function, argument) if torch.cuda.is_available() else function(argument)


def apart(function: Callable[[str], T], argument: str) -> T:
    """Call a function of a module in another process, and return its result, which must be JSON data. Raises
    RuntimeError with the end of the output if the process fails, crashes, or does not end within LIMIT_S seconds."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        result = Path(folder) / "result.json"
        call = [function.__module__, function.__name__, argument, str(workload.IMAGE_SIZE), str(result)]
        command = [sys.executable, "-m", "benchmarks.apart", *call]
        code = limited_process.run(command, LIMIT_S, cwd=ROOT, stdout=log, stderr=log)
        if problem := limited_process.end_of(code, LIMIT_S):
            log.seek(0)
            raise RuntimeError(f"the process of {argument} {problem}\n{log.read()[-4000:]}")
        return json.loads(result.read_text())


def main() -> None:
    module, function, argument, image_size, result = sys.argv[1:]
    workload.IMAGE_SIZE = int(image_size)  # set before the function's module imports it
    found = getattr(import_module(module), function)(argument)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
