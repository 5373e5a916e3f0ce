"""python -m benchmarks.table: rewrite the README's benchmark section from benchmarks/results/*.json."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.results import FOLDER, markdown

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = ("step", "memory", "ops", "scaling", "loader", "startup", "step-gpu")


def section(folder: Path) -> str:
    """The tables of all results that are there, in the order of ORDER."""
    files = (folder / f"{name}.json" for name in ORDER)
    return "\n".join(markdown(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists())


def rewrite(text: str, tables: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError where they are missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"needs the lines {START} and {END}, between which the tables go")
    return f"{before}{START}\n{tables}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.partition(": ")[2])
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(rewrite(text, section(args.results)), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"benchmarks.table: {args.readme}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
