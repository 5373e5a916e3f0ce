"""python -m benchmarks.table: updates the tables in the READMEs from benchmarks/results/*/*.json."""

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
ALL: tuple[str, ...] = ("step", "memory", "ops", "scaling", "loader", "fetching", "features", "startup", "saving")
ALL += ("faster", "muon", "knn", "heads", "probe")
ALL += ("native", "native-padding", "gpu-checks", "gpu-ops", "gpu-tuning", "gpu-step", "gpu-profile")
PLOT = "scaling.png"
SPEEDUP = "the engine's speed-up"
SPEEDUPS = {"over reference": "reference", "over expert": "expert"}
NAMES = {  # common names of CPUs that virtual machines identify by numbers
    "AMD EPYC, family 25 model 17": "AMD Zen 4",
    "AMD EPYC, Zen 5": "AMD Zen 5",
    "Intel Xeon Processor, family 6 model 167": "Intel with AMX",
    "Intel Xeon Processor, family 6 model 207": "Intel without AMX",
}
EARLIER = "0.1.0"  # last version in which the expert did computations that cannot affect the loss
NOTE = "\\* against an earlier, weaker expert, which embedded all patches and made logits for all positions."


def machines(folder: Path) -> list[Path]:
    """Return the folders of results that contain one of ALL; that of the study does not."""
    return sorted({path.parent for name in ALL for path in folder.glob(f"*/{name}.json")})


def tables(machine: Path, names: tuple[str, ...]) -> str:
    """Return the tables of those results in `names` that a machine has."""
    files = (machine / f"{name}.json" for name in names)
    return "\n".join(markdown(file) for file in files if file.exists())


def page(machine: Path) -> str:
    """Return the page with all results of a machine."""
    plot = f"\n![Speed and memory as one thing grows]({PLOT})\n" if (machine / PLOT).exists() else ""
    return f"# {machine.name}\n\nMade by `python -m benchmarks.table`.\n\n{tables(machine, ALL)}{plot}"


def section(folder: Path, readme: Path) -> str:
    """Return the table of training steps: a row for each machine, with the engine's throughput and its speed-ups by
    model size."""
    cases: list[tuple[str, int]] = []
    machine_rows = []
    marked = False
    for machine in machines(folder):
        if not (machine / "step.json").exists():
            continue
        steps = json.loads((machine / "step.json").read_text(encoding="utf-8"))
        device, earlier = steps["about"]["device"], steps["about"]["m3ae_fast"] == EARLIER
        marked |= earlier
        name = f"[{NAMES.get(device, device)}]({os.path.relpath(machine / 'README.md', readme.parent)})"
        by_case: dict[tuple[str, int], dict[str, results.Row]] = {}
        for row in steps["rows"]:
            by_case.setdefault((row["size"], row["batch"]), {})[row["implementation"]] = row
        cases += [case for case in by_case if case not in cases]
        machine_rows.append((name, by_case, " *" if earlier else ""))
    titles = [t for size, batch in cases for t in (f"{size}, batch {batch}: samples/s", *SPEEDUPS)]
    lines = [f"| machine | {' | '.join(titles)} |", "|---" + "|--:" * len(titles) + "|"]
    for name, by_case, mark in machine_rows:
        cells = [cell for case in cases for cell in _cells(by_case.get(case), mark)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", NOTE] if marked else []), ""])


def _cells(rows: dict[str, results.Row] | None, mark: str) -> list[str]:
    """Return the cells for one model size on one machine: the engine's samples/s, and its speed-ups over the baselines.

    `mark` is added to the speed-up over the expert.
    """
    if rows is None:
        return ["-"] * (1 + len(SPEEDUPS))
    reference, expert = (f"{rows[who][SPEEDUP]:.2f} x" for who in SPEEDUPS.values())
    return [f"{rows['engine']['samples/s']:.3g}", reference, expert + mark]


def rewrite(text: str, made: str) -> str:
    """Return `text` with the part between the markers replaced. Raises ValueError if the markers are missing."""
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
