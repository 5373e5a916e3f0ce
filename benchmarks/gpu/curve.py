"""python -m benchmarks.gpu.curve: compares the loss curves of the quickstart on a GPU in bf16 and in float32, on the
CPU, and on the GPU with a kill halfway. Writes gpu-curve.json, and keeps the log and the metrics of each run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.alone import ROOT
from benchmarks.gpu.processes import Processes

CONFIG = ROOT / "configs/quickstart.json"
LOSSES = ("val_image_loss", "val_text_loss")
PATIENCE_S = 390  # time limit in seconds, below the time limit of the stage in the plan


@dataclass(frozen=True)
class Curve:
    """A run: its precision, its environment variables, and the step after which it is killed once (None: never)."""

    name: str
    precision: str
    env: dict[str, str] = field(default_factory=dict, hash=False)
    kill_at: int | None = None


CPU = {"CUDA_VISIBLE_DEVICES": ""}
CURVES = (
    Curve("CPU, float32", "fp32", CPU),
    Curve("GPU, float32", "fp32"),
    Curve("GPU, bf16", "bf16"),
    Curve("GPU, float32, killed", "fp32", kill_at=160),
)


def measure(folder: Path, curves: Sequence[Curve] = CURVES, settings: Mapping[str, object] | None = None) -> int:
    """Run all curves in parallel, write a row per evaluation with the losses of all runs, and return the number of
    failed runs. `settings`: settings for the trainer's --set."""
    failed, until = 0, time.monotonic() + PATIENCE_S
    with tempfile.TemporaryDirectory() as temporary:
        runs = {curve: Path(temporary) / str(i) for i, curve in enumerate(curves)}
        with ExitStack() as stack:
            stack.callback(_keep, runs, folder)  # called after the runs have ended
            started = {curve: stack.enter_context(Processes(patience=0)) for curve in curves}
            trainers = {curve: _start(curve, started[curve], run, settings or {}) for curve, run in runs.items()}
            for curve in sorted(curves, key=lambda each: each.kill_at is None):
                code = _finish(curve, started[curve], trainers[curve], runs[curve], settings or {}, until)
                failed += code != 0
                print(f"{curve.name}: exit code {code}", flush=True)
        found = {curve.name: evaluations(run / "metrics.jsonl") for curve, run in runs.items()}
    rows = table(found)
    if rows:
        results.write("gpu-curve", "The quickstart's held-out losses by step", rows, folder)
    return failed + (not rows)


def _keep(runs: Mapping[Curve, Path], folder: Path) -> None:
    """Copy the log and the metrics of each run to a folder with the name of the run."""
    for curve, run in runs.items():
        kept = folder / "".join(c if c.isalnum() else "-" for c in curve.name.lower())
        kept.mkdir(parents=True, exist_ok=True)
        for file, name in ((run / "metrics.jsonl", "metrics.jsonl"), (run.with_suffix(".log"), "log.txt")):
            if file.exists():
                shutil.copy(file, kept / name)


def _start(curve: Curve, processes: Processes, run: Path, settings: Mapping[str, object]) -> subprocess.Popen:
    values = {"run.dir": run, "train.precision": curve.precision, **settings}
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    program = [sys.executable, str(ROOT / "m3ae_fast/train.py"), "--config", str(CONFIG), "--resume", "auto"]
    return processes.start([*program, *options], run.with_suffix(".log"), curve.env, cwd=ROOT)


def _finish(
    curve: Curve,
    processes: Processes,
    trainer: subprocess.Popen,
    run: Path,
    settings: Mapping[str, object],
    until: float,
) -> int | None:
    """Wait for the end of a run and return its exit code. If the curve has a step for a kill, kill the run there and
    start it again."""
    if curve.kill_at is not None:
        while trainer.poll() is None and time.monotonic() < until and last_step(run) < curve.kill_at:
            time.sleep(0.05)
        if trainer.poll() is not None:
            return trainer.returncode or 1  # the trainer ended before it was killed
        processes.end()
        trainer = _start(curve, processes, run, settings)
    try:
        return trainer.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _lines(metrics: Path) -> list[dict]:
    """Return the logged lines, except an incomplete last line."""
    whole, _, _ = (metrics.read_text(encoding="utf-8") if metrics.exists() else "").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def last_step(run: Path) -> int:
    return max((line["step"] for line in _lines(run / "metrics.jsonl")), default=0)


def evaluations(metrics: Path) -> dict[int, dict[str, float]]:
    """Return the held-out losses by step."""
    return {line["step"]: {name: line[name] for name in LOSSES} for line in _lines(metrics) if LOSSES[0] in line}


def table(found: Mapping[str, dict[int, dict[str, float]]]) -> list[results.Row]:
    """Return a row per step and loss, with a column per run. The value of a run without an evaluation at the step is
    None."""
    steps = sorted({step for curve in found.values() for step in curve})
    return [
        {"step": step, "loss": name, **{run: curve.get(step, {}).get(name) for run, curve in found.items()}}
        for step in steps
        for name in LOSSES
    ]


def main() -> int:
    """Print and write the table, and return the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu.curve: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    return 1 if measure(results.here()) else 0


if __name__ == "__main__":
    sys.exit(main())
