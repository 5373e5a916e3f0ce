"""Mutation testing: do the tests notice a bug? python -m lab.mutation --out FOLDER [--count 150] [--seed 0]

A random sample of small bugs (mutants) is inserted into the code, one at a time. For each mutant, the tests that
execute the changed line are run, fastest first, up to a time limit. If none of them fails, the slow tests of that part
of the code are also run. Each result is written to FOLDER/results.jsonl at once. To resume, run the same command again.

FOLDER/coverage*.json are written by `python -m lab.mutation.coverage_map`. A complete run takes about an hour on one
core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lab.mutation.mutants import LEFT_OUT, ROOT, Mutant, sample
from lab.mutation.trial import import_libraries, trial

FAST_S = 6.0  # maximum total duration in seconds of the fast tests for a mutant
RESUMED = "tests/test_resume.py"
FAST, SLOWLY = "fast", "slow"
SLOW = {  # slow tests by the part of the code that a mutant is in
    "m3ae_fast/engine/deepspeed": [f"{RESUMED}::test_resume_is_bitwise[{stage}]" for stage in (2, 3)],
    "m3ae_fast/engine": [RESUMED, "-k", "not bitwise and not signal and not launcher and not stage"],
    "m3ae_fast/training": [RESUMED, "-k", "not bitwise and not signal and not launcher and not stage"],
    "m3ae_fast/checkpoint": [RESUMED, "tests/test_checkpoint_parts.py"],
    "m3ae_fast/images": ["tests/data"],
    "m3ae_fast/process": ["tests/test_stall_detection.py", "tests/test_ranks.py", "tests/test_stop_and_stall.py"],
    "m3ae_fast/config": ["tests/test_config.py"],
    "m3ae_fast/data": ["tests/data", "tests/test_hostile_files.py"],
    "m3ae_fast/batch": ["tests/data", "tests/test_model.py"],
    "m3ae_fast/shards": ["tests/data", "tests/test_vqgan.py"],
    "m3ae_fast/vqgan": ["tests/test_vqgan.py"],
    "m3ae_fast/weights": ["tests/weights"],
    "m3ae_fast/evaluation": ["tests/evaluation"],
    "m3ae_fast/model": ["tests/test_model.py", "tests/test_speed.py", "tests/test_verify.py", "tests/weights"],
    "m3ae_fast/pretraining": ["tests/test_pretrain.py"],
    "m3ae_fast/drawing": ["tests/test_drawing.py", "tests/test_draw.py", "tests/evaluation/test_figures.py"],
    "m3ae_fast/verify": ["tests/test_verify.py"],
    "m3ae_fast/train.py": ["tests/test_config.py", "tests/test_training_loop.py"],
    "m3ae_fast/": ["tests/weights", "tests/evaluation", "tests/test_report.py", "tests/test_draw.py"],
    "kernels": ["tests/kernels/test_kernel_ops.py", "tests/kernels/test_kernel_api.py"],
}
LIMIT_S = {FAST: 60.0, SLOWLY: 300.0}  # tests that take longer count as hanging
TREE = ("m3ae_fast", "kernels", "tests", "benchmarks", "lab", "configs", "data", "docs", "examples", ".github")
TREE += ("README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml", ".pre-commit-config.yaml")


class Choice:
    """The choice of the tests for a mutant."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, dict[str, list[str]]] = {}  # tests by file and line
        for file in folder.glob("coverage*.json"):
            known = json.loads(file.read_text())
            self.seconds |= known["seconds"]
            for name, lines in known["tests"].items():
                for line, tests in lines.items():
                    self.tests.setdefault(name, {}).setdefault(line, []).extend(tests)

    def fast(self, mutant: Mutant) -> list[str]:
        """Return the fast tests for a mutant: tests that execute the mutated line or, if the line is executed only
        during imports, tests that execute any line of its file."""
        lines = self.tests.get(mutant.file, {})
        seen = lines.get(str(mutant.line)) or [test for tests in lines.values() for test in tests]
        chosen, total = [], 0.0
        for test in sorted(set(seen), key=self.seconds.__getitem__):
            total += self.seconds[test]
            if chosen and total > FAST_S:
                break
            chosen.append(test)
        return chosen

    def slow(self, mutant: Mutant) -> list[str]:
        return next(tests for part, tests in SLOW.items() if mutant.file.startswith(part))


def report(results: list[dict], seed: int) -> str:
    by_mutant: dict[str, str | None] = {}
    for result in results:
        by_mutant[result["mutant"]] = by_mutant.get(result["mutant"]) or result["noticed"]
    noticed = sum(by is not None for by in by_mutant.values())
    survivors = "\n".join(f"- `{mutant}`" for mutant, by in by_mutant.items() if by is None)
    left_out = "\n".join(f"- {file}: {why}" for file, why in LEFT_OUT.items())
    return (
        f"{noticed} of {len(by_mutant)} mutants were noticed ({noticed / len(by_mutant):.0%}), seed {seed}.\n\n"
        f"Mutants that were not noticed:\n\n{survivors}\n\nFiles without mutants:\n\n{left_out}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder with coverage*.json, to which results are written"
    )
    parser.add_argument("--count", type=int, default=150, help="number of mutants (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample of mutants (default: 0)")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    import_libraries()
    choice, file = Choice(args.out), args.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        for name in TREE:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tree / name)
        for which, tests_of in ((FAST, choice.fast), (SLOWLY, choice.slow)):
            done = {result["mutant"] for result in results if result["tests"] == which or result["noticed"]}
            for mutant in sample(args.count, args.seed):
                if mutant.name in done or not (tests := tests_of(mutant)):
                    continue
                verdict = trial(mutant, tests, tree, LIMIT_S[which])
                result = {"mutant": mutant.name, "tests": which, "noticed": verdict.noticed}
                results.append(result | {"seconds": round(verdict.seconds, 1)})
                with file.open("a") as out:
                    out.write(json.dumps(results[-1]) + "\n")
                print(f"{which}: {mutant.name}: {verdict.noticed or 'SURVIVES'}", flush=True)
        credited = sorted({result["noticed"] for result in results if "::" in (result["noticed"] or "")})
        unchanged = trial(Mutant("README.md", 0, 0, 0, "", ""), credited, tree, 600)
    if unchanged.noticed:
        raise RuntimeError(f"a test that noticed a mutant also fails on unchanged code: {unchanged.noticed}")
    print(report(results, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
