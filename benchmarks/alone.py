"""An implementation in a separate process, which takes steps on request.

Separate processes let implementations alternate without sharing memory, threads or settings of the allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As in train.py, waiting threads yield their cores, and the engine's memory is allocated in large pages. The baselines
# do not use large pages, because they free and allocate memory all the time and would become slower by a tenth.
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
ENGINE = {"THP_MEM_ALLOC_ENABLE": "1"}
LIMIT_S = 1800.0  # maximum time of a step, or of the compilation and the first two steps


class Alone:
    """An implementation that runs in another process until the `with` block ends.

    Args:
        name: one of `implementations.NAMES`.
        model: fields of ModelConfig.
        samples: number of samples in the batch.
        env: additional environment variables.
        options: `masking` (fields of MaskingConfig), `optim` (fields of OptimConfig), `words` and `batches`;
            see `implementations.build`.
    """

    losses: list[float]  # losses of the first two steps

    def __init__(self, name: str, model: dict, samples: int, *, env: dict[str, str] | None = None, **options) -> None:
        spec = {"name": name, "model": model, "samples": samples, "options": options}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.alone", json.dumps(spec)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | (ENGINE if name == "engine" else {}) | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.losses = self._answer()

    def step(self) -> float:
        """Take a step and return its duration in seconds."""
        return self._ask("step")

    def _ask(self, what: str):
        print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        began = time.monotonic()
        late = threading.Timer(LIMIT_S, self._process.kill)  # a kernel may hang
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            slow = f" because it did not answer within {LIMIT_S:g} s" if time.monotonic() - began > LIMIT_S else ""
            raise RuntimeError(f"the process ended with exit code {self._process.wait()}{slow}")
        return json.loads(line)

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def peak_above(function: Callable[[], object], device) -> int:
    """Return the peak memory of a call of `function` in bytes, minus the memory that the process holds before it."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("self")["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return _status("self")["VmHWM"] - before


def peak_of(process: int) -> int:
    """Return the peak memory of a process so far in bytes; 0 if it has ended. `process`: its process ID."""
    try:
        return _status(str(process)).get("VmHWM", 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _status(process: str) -> dict[str, int]:
    """Return the entries of /proc/PID/status that state an amount of memory, in bytes, by their names."""
    lines = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def serve(spec: dict) -> None:
    """Build the implementation, print the losses of its first two steps, and then answer each request with one line.
    This function runs in the other process."""
    from m3ae_fast.process.ranks import join_ranks

    answers, sys.stdout = sys.stdout, sys.stderr
    with join_ranks() as ranks:
        _serve(spec, ranks, answers)


def _serve(spec: dict, ranks, answers) -> None:
    from benchmarks.implementations import build
    from m3ae_fast.config import MaskingConfig, ModelConfig, OptimConfig

    options = spec["options"]
    options["masking"] = MaskingConfig(**options.get("masking", {}))
    options["optim"] = OptimConfig(**options.get("optim", {}))
    step = build(spec["name"], ModelConfig(**spec["model"]), spec["samples"], ranks, **options)
    answer = [step().item() for _ in range(2)]
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        what = sys.stdin.readline().strip()
        if what == "step":
            start = time.perf_counter()
            step().item()
            answer = time.perf_counter() - start
        else:
            break


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
