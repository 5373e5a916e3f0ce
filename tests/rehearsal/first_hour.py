"""python -m tests.rehearsal.first_hour [--results FOLDER]: run all stages of the plan in benchmarks/gpu without a GPU,
with a simulated GPU and small sizes. In the first run, an op, a process, a program and a trainer are made to fail; then
these stages are repeated without faults. The exit code is 1 if a record is missing that would exist on a GPU. It takes
a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from m3ae_kernels import tuning

import benchmarks.gpu  # noqa: F401 - makes kernels/ importable in a checkout that is not installed

ROOT = Path(__file__).parents[2]
FAULTS = {"checks": "failed", "attention": "failed", "large-256": "out of time"}  # expected ends of stages with faults
SHORT = 30  # time limit in seconds of the trainer that hangs
TABLES = {
    "ceilings": ["gpu-ceilings.json"],
    "checks": [f"{dtype}/gpu-checks.json" for dtype in ("bfloat16", "float16", "float32")],
    "attention": ["gpu-attention.json"],
    "attention-tuning": ["gpu-tuning.json"],
    "memcheck": ["gpu-checks.json"],
    "racecheck": ["gpu-checks.json"],
    "curve": ["gpu-curve.json"],
    "ops": ["gpu-checks.json", "gpu-ops.json"],
    "ops-compiled": ["gpu-checks.json", "gpu-ops.json"],
    "tune": ["gpu-tuning.json"],
}
STEP = ["gpu-step.json"]  # files of the stages that time training
SANITIZER = """#!/bin/sh
while [ "$1" != "$STAND_IN_PYTHON" ]; do shift; done
exec "$@"
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.first_hour", description=__doc__.split(":")[1])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where to write (default: nowhere that stays)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= stand_in(folder)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        sys.executable, tuning.FOLDER = os.environ["STAND_IN_PYTHON"], folder / "tuning"
        problems = rehearse((args.results or folder / "results").absolute())
    print("\n".join(problems) or "all records are there", flush=True)
    return 1 if problems else 0


def stand_in(folder: Path) -> dict[str, str]:
    """Write a Python that finds a simulated GPU, tables that may be changed, and a stand-in for compute-sanitizer to
    `folder`. Return the environment variables with which processes use them."""
    python, real = folder / "bin/python", sys.executable
    python.parent.mkdir()
    for path, text in (
        (python, f'#!/bin/sh\nexec "{real}" -m tests.rehearsal.stand_in_python "$@"\n'),
        (python.with_name("compute-sanitizer"), SANITIZER),
    ):
        path.write_text(text)
        path.chmod(0o755)
    tables, packages = folder / "tuning", [str(ROOT), str(ROOT / "kernels")]
    shutil.copytree(tuning.FOLDER, tables, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return {
        "REAL_PYTHON": real, "STAND_IN_PYTHON": str(python), "STAND_IN_TUNING": str(tables),
        "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(packages),
        "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def rehearse(folder: Path) -> list[str]:
    """Run the plan twice, and return descriptions of failures."""
    from benchmarks import results
    from benchmarks.gpu import archive, plan

    stages = [replace(stage, seconds=SHORT if stage.name == "large-256" else 600) for stage in plan.PLAN]
    expected = {stage.name: TABLES.get(stage.name, STEP if "-" in stage.name else []) for stage in stages}
    problems = []
    for faults, outcomes in (("op process stage hang", FAULTS), ("", {})):
        os.environ["FAULTS"] = faults
        code = plan.run(folder, 3600, stages, again=() if faults else FAULTS)
        stages = [replace(stage, seconds=600) for stage in stages]
        problems += [f"the plan's exit code is {code}"] if code != bool(faults) else []
        with tarfile.open(folder / archive.ARCHIVE) as packed:
            there = set(packed.getnames())
        for name, tables in expected.items():
            outcome = json.loads((folder / name / archive.RECORD).read_text(encoding="utf-8"))["outcome"]
            if outcome != outcomes.get(name, "done"):
                problems.append(f"{name} is {outcome}, with faults {faults!r}")
            wanted = tables if outcome != "out of time" and (name, faults) != ("attention", faults) else []
            problems += [f"{name} has no {table}" for table in wanted if f"{name}/{table}" not in there]
        rows = [row for path in (folder / "checks").rglob("gpu-checks.json") for row in results.read(path)]
        failed = sorted(row["verdict"] for row in rows if row["verdict"] != "ok")
        wanted = ["raises RuntimeError: made to fail", "the process ended with SIGABRT"] if faults else []
        problems += [f"checks that failed: {failed}"] if failed != wanted else []
        problems += [] if len(rows) == 11 + 3 * 11 else [f"{len(rows)} checks"]
    return problems + [f"process {pid} is left" for pid in left_running()]


def left_running() -> list[str]:
    """Return the ids of other running processes that use the simulated GPU."""
    mark, found = f"STAND_IN_PYTHON={os.environ['STAND_IN_PYTHON']}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if mark in path.read_bytes() else []
        except OSError:
            continue
    return [pid for pid in found if int(pid) != os.getpid()]


if __name__ == "__main__":
    sys.exit(main())
