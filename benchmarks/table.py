"""python -m benchmarks.table: rewrite the READMEs' tables from benchmarks/results/*/*.json."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.results import RESULTS, markdown

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HEADLINES = ("step", "memory", "gpu-step")  # what the README itself shows
ALL = ("step", "memory", "ops", "scaling", "loader", "startup")
ALL += ("gpu-checks", "gpu-ops", "gpu-tuning", "gpu-step", "gpu-profile")
PLOT = "scaling.png"


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
    """The headlines of all machines."""
    parts = []
    for machine in machines(folder):
        if text := tables(machine, HEADLINES):
            link = os.path.relpath(machine / "README.md", readme.parent)
            parts.append(f"{text}\n[All results of this machine]({link})\n")
    return "\n".join(parts)


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
