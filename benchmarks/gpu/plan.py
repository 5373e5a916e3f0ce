"""`python -m benchmarks.gpu --all`: the first hour on a GPU, stage by stage, in calls of a few minutes each.

Each stage is a process of its own, or several at once, with a time limit. What it prints and writes is kept in a folder
of its name before anything reads it; record.json there says how it ended. A stage that has a record is done: the next
call goes on after it, and runs again what lacked a module that is there now. A stage that fails, hangs or prints
nothing costs that stage alone. Compilers' caches stay in the folder from call to call.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks import results
from benchmarks.alone import ROOT

RECORD = "record.json"
LATER = 3  # exit code: stages are left for the next call
BETTER = "{better}"  # in a command: the faster of the two engines, as measured by the stages of its name
SIZES = ("large", "base", "small")
ENGINES = {"deepspeed": "large-deepspeed", "torch": "large-torch"}


@dataclass(frozen=True)
class Stage:
    """Commands that run at once, arguments of Python's where `tool` is None, for at most so many seconds."""

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    env: dict[str, str] = field(default_factory=dict)
    tool: str | None = None  # a program that must exist for the stage to run, and runs Python


def _step(name: str, on: str, seconds: float = 180, *options: str, env: dict[str, str] | None = None) -> Stage:
    size, _, _ = name.partition("-")
    command = ("-m", "benchmarks.gpu", "--step", "--size", size, "--on", on, *options)
    return Stage(name, seconds, (command,), {"TORCH_LOGS": "recompiles,graph_breaks"} | (env or {}))


def _suite(*options: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.gpu", *options)


OWN = {"M3AE_KERNELS_IMPL": "triton"}  # attention too, which else may run on another library's kernel
GOLDEN = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/golden").glob("*.npz")))
PLAN = (
    Stage("ceilings", 120, (("-m", "benchmarks.gpu.ceilings"),)),
    Stage("verify", 120, (("-m", "m3ae_fast", "verify", *GOLDEN, "--device", "cuda"),)),
    Stage(
        "checks", 180, tuple(_suite("--quick", "--dtype", dtype) for dtype in ("bfloat16", "float16", "float32")), OWN
    ),
    Stage("memcheck", 150, (("--tool", "memcheck", sys.executable, *_suite("--odd")),), OWN, tool="compute-sanitizer"),
    Stage(
        "racecheck", 150, (("--tool", "racecheck", sys.executable, *_suite("--odd")),), OWN, tool="compute-sanitizer"
    ),
    _step("large-deepspeed", "deepspeed", 240),
    _step("large-torch", "torch", 240),
    Stage("attention", 180, (("-m", "benchmarks.gpu.attention"),)),
    _step("large-recompute", BETTER, 180, "--recompute"),
    _step("large-triton", BETTER, 180, env=OWN),
    _step("large-256", BETTER, 180, "--samples", "256"),
    _step("large-1024", BETTER, 180, "--samples", "1024"),
    Stage("curve", 480, (("-m", "benchmarks.gpu.curve"),)),
    _step("large-expert", "expert"),
    _step("base-deepspeed", "deepspeed"),
    _step("base-torch", "torch"),
    _step("small-deepspeed", "deepspeed"),
    _step("small-torch", "torch"),
    Stage("ops", 480, (_suite("--no-compile"),)),
    Stage("ops-compiled", 480, (_suite(),)),
    Stage("tune", 500, (_suite("--tune", "--budget", "480"),)),
)


def run(folder: Path, seconds: float, stages: Sequence[Stage] = PLAN) -> int:
    """Run the stages that have no record and for which time is left; return 0, 1 where one has failed by now, or
    `LATER` where some are left."""
    deadline, begun = time.monotonic() + seconds, False
    outcomes: list[str] = []
    for stage in stages:
        place = folder / stage.name
        if not _is_done(place):
            left = deadline - time.monotonic()
            if begun and left < stage.seconds:  # a call's first stage has at least the call
                print(f"{stage.name} takes up to {stage.seconds:.0f} s, {max(0, left):.0f} are left: call again")
                return LATER
            begun = True
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            record = _run_stage(stage, place, folder, min(stage.seconds, left))
            partial = place / f".{RECORD}"
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            partial.replace(place / RECORD)
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        outcomes.append(record["outcome"])
        lacks = f", without {record['lacks']}: python -m benchmarks.gpu.wheels" if record["lacks"] else ""
        print(f"{stage.name:16} {record['outcome']:12} {record['seconds']:6.0f} s  {place}{lacks}", flush=True)
    return 0 if {"done", "absent"} >= set(outcomes) else 1


def _is_done(place: Path) -> bool:
    """Return whether a stage has a record, but for one that only lacked a module which is there now."""
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return not record["lacks"] or find_spec(record["lacks"]) is None


def _run_stage(stage: Stage, place: Path, folder: Path, seconds: float) -> dict[str, str | float | list[int | None]]:
    tool = sys.executable if stage.tool is None else shutil.which(stage.tool)
    if tool is None:
        return {"outcome": "absent", "seconds": 0.0, "exit codes": [], "lacks": ""}
    began = time.monotonic()
    environment = os.environ | caches(folder) | stage.env
    environment |= {results.ELSEWHERE: str(place.absolute()), "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen] = []
    logs = [place / (f"log-{i}.txt" if i else "log.txt") for i in range(len(stage.commands))]
    try:
        with ExitStack() as files:
            for command, log in zip(stage.commands, logs):
                arguments = [better_engine(folder) if part == BETTER else part for part in command]
                output = files.enter_context(log.open("wb"))
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                own = subprocess.Popen([tool, *arguments], cwd=ROOT, env=environment, start_new_session=True, **streams)
                processes.append(own)
        codes = [_wait(process, began + seconds) for process in processes]
    finally:
        for process in processes:
            _end(process)
    if None in codes:
        outcome = "out of time"
    elif any(codes):
        outcome = "failed"
    else:
        outcome = "done" if all(log.stat().st_size for log in logs) else "silent"
    said = "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs) if outcome == "failed" else ""
    missing = re.findall(r"^ModuleNotFoundError: No module named '(\w+)", said, re.MULTILINE)
    return {
        "outcome": outcome,
        "seconds": time.monotonic() - began,
        "exit codes": codes,
        "lacks": missing[-1] if missing else "",
    }


def _wait(process: subprocess.Popen, until: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, until - time.monotonic()))
    return None


def _end(process: subprocess.Popen) -> None:
    """End the process, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def caches(folder: Path) -> dict[str, str]:
    """Return where compilers keep what they made."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {variable: str((folder / "caches" / name).absolute()) for variable, name in names.items()}


def better_engine(folder: Path) -> str:
    """Return the engine of more samples a second, "torch" where neither has a number."""

    def speed(engine: str) -> float:
        with suppress(OSError, ValueError, LookupError, TypeError):
            text = (folder / ENGINES[engine] / "gpu-step.json").read_text(encoding="utf-8")
            return float(json.loads(text)["rows"][0]["samples/s"])
        return 0.0

    return max(("torch", "deepspeed"), key=speed)
