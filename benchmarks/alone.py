"""One contender in a process of its own: start-up, speed and peak memory of its training steps.

`measure(...)` starts `python -m benchmarks.alone JSON`, which prints an `Alone` as JSON. On a CPU the memory is the
peak of the process's resident memory during a step, on a GPU that of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Alone:
    startup: float  # seconds from the start of the process to the end of the first step: imports, model, compilation
    seconds: list[float]  # of the steps after the second
    peak_bytes: int  # in a step, above parameters, gradients and optimiser state
    parameters: int


def measure(name: str, model: dict, samples: int, *, rounds: int = 3, env: dict[str, str] | None = None, **options):
    """An Alone of contender `name`. `model`: fields of ModelConfig; `options`: arguments of `contenders.build`."""
    spec = {"name": name, "model": model, "samples": samples, "rounds": rounds, "options": options}
    command = [sys.executable, "-m", "benchmarks.alone", json.dumps(spec)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, text=True, check=True
    )
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def peak_above(function: Callable[[], object], device) -> int:
    """Bytes that `function` needs at its peak beyond what the process holds before it."""
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
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def main(spec: dict) -> Alone:
    import torch

    from benchmarks.contenders import build
    from m3ae_fast.config import MaskingConfig, ModelConfig
    from m3ae_fast.engine import distributed
    from m3ae_fast.model.m3ae import M3AE

    ranks = distributed.start()
    model, options = ModelConfig(**spec["model"]), spec["options"]
    options["masking"] = MaskingConfig(**options.pop("masking", {}))
    step = build(spec["name"], model, spec["samples"], ranks, **options)
    step().item()
    startup = _age()
    step().item()
    seconds = []
    for _ in range(spec["rounds"]):
        start = time.perf_counter()
        step().item()
        seconds.append(time.perf_counter() - start)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in M3AE(model).parameters())
    peak = peak_above(step, ranks.device) - 4 * parameters  # gradients, which every step makes and drops
    distributed.stop()
    return Alone(startup, seconds, peak, parameters)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported
    print(json.dumps(asdict(main(json.loads(sys.argv[1])))))
