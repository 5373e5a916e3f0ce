"""`python -m benchmarks.gpu --all`: the validation of the kernels on a new GPU in stages, in calls of a few minutes
each.

Each stage consists of one or more processes with a time limit. The output of its commands is stored in the folder of
the stage, or in sub-folders with the names of the commands, before it is evaluated. The file record.json describes how
the stage ended. A stage with a record is complete. The next call continues with the following stages; it repeats a
stage that failed because of a missing module if the module is now installed. A stage that fails, hangs or prints
nothing does not affect other stages, and all its processes are ended. After every stage, records, logs and tables are
packed into one file, which the next call uses, even on another machine. Compiler caches stay in the folder between
calls. PLAN.md describes the result of each stage.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from benchmarks import results
from benchmarks.alone import ROOT
from benchmarks.gpu import archive
from benchmarks.gpu.archive import RECORD
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.tune import apply

LATER = 3  # exit code if stages are left for the next call
BETTER = "{better}"  # placeholder in a command for the engine that was faster in earlier stages
SIZES = ("large", "base", "small")
ENGINES = {"deepspeed": "large-deepspeed", "torch": "large-torch"}
SANITIZER_ERROR = "86"  # exit code of compute-sanitizer if it has found an error


@dataclass(frozen=True)
class Stage:
    """A stage: commands that run in parallel for at most `seconds`, by the name of their folder ("": the folder of the
    stage). The commands are arguments of Python or, if there is a `tool`, of the tool."""

    name: str
    seconds: float
    commands: dict[str, tuple[str, ...]]
    env: dict[str, str] = field(default_factory=dict)
    tool: str | None = None  # a program that runs Python; without it, the stage is skipped


def _stage(name: str, seconds: float, module: str, *options: str, env: dict[str, str] | None = None) -> Stage:
    return Stage(name, seconds, {"": ("-m", module, *options)}, env or {})


def _step(name: str, on: str, seconds: float, *options: str, env: dict[str, str] | None = None) -> Stage:
    size, _, _ = name.partition("-")
    logs = {"TORCH_LOGS": "recompiles,graph_breaks"}
    return _stage(name, seconds, SUITE, "--step", "--size", size, "--on", on, *options, env=logs | (env or {}))


def _sanitized(tool: str) -> Stage:
    """Return a stage that checks small odd sizes with a tool of compute-sanitizer. torch's caching allocator is
    disabled, because it allocates large blocks, in which an out-of-bounds access is not detected."""
    options = ("--tool", tool, "--target-processes", "all", "--error-exitcode", SANITIZER_ERROR)
    command = (*options, sys.executable, "-m", SUITE, "--odd")
    return Stage(tool, 150, {"": command}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, tool="compute-sanitizer")


SUITE = "benchmarks.gpu"
OWN = {"M3AE_KERNELS_IMPL": "triton"}  # uses the project's own kernels, including attention
GOLDEN = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/golden").glob("*.npz")))
# The stages in order of importance. The time limits of the stages before "base" add up to 45 minutes.
PLAN = (
    _stage("ceilings", 90, "benchmarks.gpu.ceilings"),
    _stage("verify", 90, "m3ae_fast", "verify", *GOLDEN, "--device", "cuda"),
    Stage(
        "checks",
        240,
        {dtype: ("-m", SUITE, "--quick", "--dtype", dtype) for dtype in ("bfloat16", "float16", "float32")},
    ),
    _stage("attention", 120, "benchmarks.gpu.attention"),
    _stage(
        "attention-tuning", 210, SUITE,
        "--tune", "attention", "attention_backward", "--dtype", "bfloat16", "--budget", "195",
    ),
    _step("large-deepspeed", "deepspeed", 240),
    _step("large-torch", "torch", 180),
    _step("large-triton", BETTER, 150, env=OWN),
    _step("large-expert", "expert", 150),
    _sanitized("memcheck"),
    _sanitized("racecheck"),
    _step("large-recompute", BETTER, 180, "--recompute"),
    _step("large-256", BETTER, 150, "--samples", "256"),
    _step("large-1024", BETTER, 180, "--samples", "1024"),
    _stage("curve", 420, "benchmarks.gpu.curve"),
    _step("base-deepspeed", "deepspeed", 180),
    _step("base-torch", "torch", 180),
    _step("small-deepspeed", "deepspeed", 180),
    _step("small-torch", "torch", 180),
    _stage("ops", 480, SUITE, "--no-compile", "--budget", "460"),
    _stage("ops-compiled", 480, SUITE, "--budget", "460"),
    _stage("tune", 500, SUITE, "--tune", "--budget", "480"),
)  # fmt: skip


def run(folder: Path, seconds: float, stages: Sequence[Stage] = PLAN, again: Collection[str] = ()) -> int:
    """Run the stages that have no record, and those named in `again`, while time is left. Return 1 if any stage has
    failed, `LATER` if stages are left, otherwise 0."""
    deadline, begun = time.monotonic() + seconds, False
    if taken := archive.unpack(folder):
        print(f"{', '.join(taken)}: restored from {folder / archive.ARCHIVE}", flush=True)
    for name in again:
        _set_aside(folder / name)
        archive.pack(folder)  # packed again, because the old archive would restore the folders that were set aside
    outcomes: list[str] = []
    for stage in stages:
        place = folder / stage.name
        if not _is_done(place):
            left = deadline - time.monotonic()
            if begun and left < stage.seconds:  # the first stage of a call always starts
                print(f"{stage.name} needs up to {stage.seconds:.0f} s, but {max(0, left):.0f} s are left: call again")
                return LATER
            begun = True
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            apply(folder)
            record = _run_stage(stage, place, folder, min(stage.seconds, left))
            partial = place / f".{RECORD}"
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            partial.replace(place / RECORD)
            archive.pack(folder)
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        outcomes.append(record["outcome"])
        lacks = f"; missing module: {record['lacks']}; run python -m benchmarks.gpu.wheels" if record["lacks"] else ""
        print(f"{stage.name:16} {record['outcome']:12} {record['seconds']:6.0f} s  {place}{lacks}", flush=True)
    return 0 if {"done", "absent"} >= set(outcomes) else 1


def _is_done(place: Path) -> bool:
    """Return whether a stage has a record. A stage that failed because of a missing module does not count if the module
    is now installed."""
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return not record["lacks"] or find_spec(record["lacks"]) is None


def _set_aside(place: Path) -> None:
    """Rename the folder of a stage, so that its results are kept."""
    if place.exists():
        taken = [int(other.suffix[1:]) for other in place.parent.glob(f"{place.name}.*") if other.suffix[1:].isdigit()]
        place.rename(f"{place}.{max(taken, default=0) + 1}")


def _run_stage(stage: Stage, place: Path, folder: Path, seconds: float) -> dict[str, object]:
    """Run a stage and return its record, after all its processes have ended."""
    record: dict[str, object] = {"began": datetime.now(timezone.utc).isoformat(timespec="seconds"), "lacks": ""}
    tool = sys.executable if stage.tool is None else shutil.which(stage.tool)
    if tool is None:
        return record | {"outcome": "absent", "seconds": 0.0, "exit codes": []}
    began = time.monotonic()
    logs = [place / name / "log.txt" for name in stage.commands]
    codes: list[int | None] = []
    with Processes() as processes:
        started = []
        for command, log in zip(stage.commands.values(), logs):
            log.parent.mkdir(exist_ok=True)
            arguments = [better_engine(folder) if part == BETTER else part for part in command]
            env = caches(folder) | stage.env | {results.ELSEWHERE: str(log.parent.absolute()), "PYTHONUNBUFFERED": "1"}
            try:
                started.append(processes.start([tool, *arguments], log, env, cwd=ROOT))
            except OSError as error:
                log.write_text(f"{error}\n", encoding="utf-8")
                codes.append(error.errno)
        codes += [_wait(process, began + seconds) for process in started]
    if processes.left:  # they may hold memory, and disturb later stages
        record["left running"] = processes.left
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    if None in codes:
        outcome = "out of time"
    elif any(codes):
        outcome = "failed"
        missing = re.findall(r"^ModuleNotFoundError: No module named '(\w+)", "\n".join(texts), re.MULTILINE)
        record["lacks"] = missing[-1] if missing else ""
    else:
        outcome = "done" if all(texts) else "silent"
    return record | {"outcome": outcome, "seconds": time.monotonic() - began, "exit codes": codes}


def _wait(process: subprocess.Popen, until: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, until - time.monotonic()))
    return None


def caches(folder: Path) -> dict[str, str]:
    """Return the environment variables for the caches of compilers."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {variable: str((folder / "caches" / name).absolute()) for variable, name in names.items()}


def better_engine(folder: Path) -> str:
    """Return the engine with more samples per second; "torch" if there are no results."""

    def speed(engine: str) -> float:
        with suppress(OSError, ValueError, LookupError, TypeError):
            text = (folder / ENGINES[engine] / "gpu-step.json").read_text(encoding="utf-8")
            return float(json.loads(text)["rows"][0]["samples/s"])
        return 0.0

    return max(("torch", "deepspeed"), key=speed)
