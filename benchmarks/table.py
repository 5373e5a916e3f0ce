"""python -m benchmarks.table: rewrite the READMEs' tables from benchmarks/results/*/*.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.results import RESULTS, markdown

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ALL = ("step", "memory", "ops", "scaling", "loader", "features", "startup")
ALL += ("gpu-checks", "gpu-ops", "gpu-tuning", "gpu-step", "gpu-profile")
PLOT = "scaling.png"
SPEEDUP = "the engine's speed-up"


def machines(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def tables(machine: Path, names: tuple[str, ...]) -> str:
    """Those results of a machine that are there."""
    files = (machine / f"{name}.json" for name in names)
    return "\n".join(markdown(file) for file in files if file.exists())


def page(machine: Path) -> str:
    """All results of a machine."""
    plot = f"\n![Speed and memory as one thing grows]({PLOT})\n" if (machine / PLOT).exists() else ""
    return f"# {machine.name}\n\nMade by `python -m benchmarks.table`.\n\n{tables(machine, ALL)}{plot}"


def section(folder: Path, readme: Path) -> str:
    """The training step on all machines: a row for each machine and size."""
    lines = [
        "| machine | size, batch | reference | expert | engine, samples/s | over the reference | over the expert |"
    ]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    for machine in machines(folder):
        if not (machine / "step.json").exists():
            continue
        steps = json.loads((machine / "step.json").read_text(encoding="utf-8"))
        name = f"[{steps['about']['device']}]({os.path.relpath(machine / 'README.md', readme.parent)})"
        by_case: dict[tuple, dict[str, results.Row]] = {}
        for row in steps["rows"]:
            by_case.setdefault((row["size"], row["batch"]), {})[row["implementation"]] = row
        for (size, batch), rows in by_case.items():
            cells = [f"{rows[who]['samples/s']:.3g}" for who in ("reference", "expert", "engine")]
            cells += [f"{rows[who][SPEEDUP]:.2f} x" for who in ("reference", "expert")]
            lines.append(f"| {name} | {size}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rewrite(text: str, made: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError where they are missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"needs the lines {START} and {END}, between which the tables go")
    return f"{before}{START}\n{made}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.partition(": ")[2])
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(rewrite(text, section(args.results, args.readme)), encoding="utf-8")
        for machine in machines(args.results):
            (machine / "README.md").write_text(page(machine), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"benchmarks.table: {args.readme}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
