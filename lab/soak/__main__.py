"""Training under random faults: python -m lab.soak --minutes 10

While a tiny model is trained, its processes are killed, frozen, suspended or sent signals, its disk is filled, its
files are damaged or deleted, and the server of its shards fails. Each run is restarted with `--resume auto` until it is
complete. Its losses, gradient norms and weights must then be bitwise identical to those of an undisturbed run. The exit
code is 1 if they are not, if anything hangs, or if a traceback is printed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lab.soak.runs import CLIPART, Soak, Tally
from lab.soak.server import faulty_server
from m3ae_fast.base.errors import exit_cleanly


def report(tally: Tally, server: Counter, seed: int, minutes: float) -> str:
    """Return the report as Markdown."""
    faults = "\n".join(f"| {name} | {count} | {tally.survived[name]} |" for name, count in sorted(tally.tried.items()))
    failures = "\n".join(f"| {name} | {count} |" for name, count in sorted(server.items()))
    wrong = "\n".join(f"- {line}" for line in tally.wrong)
    wrong = wrong or "No run hung, no result was lost, and no traceback was printed."
    return f"""# Fault-injection soak test

Command: `python -m lab.soak --seed {seed}`, {minutes:.1f} minutes, torch {torch.__version__}, Python \
{platform.python_version()}.

{tally.tried.total()} faults were injected into {tally.runs} runs, which were started {tally.starts} times in total. \
The HTTP server that provides the shards failed {server.total()} times. {tally.whole} of {tally.runs} runs were \
bitwise identical to an undisturbed run at the end: they had the same losses, gradient norms and learning rates, and \
the same weights and optimiser moments in the last checkpoint.

{wrong}

| fault | injected | injected into runs that ended identically |
|---|--:|--:|
{faults}

| HTTP status, or other failure of the server | times |
|---|--:|
{failures}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="minutes after which no more faults are injected; the last run is then completed (default: 10)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the faults (default: 0)")
    parser.add_argument("--out", type=Path, help="Markdown file to which the report is also written")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    until = begin + 60 * args.minutes
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        faulty_server(CLIPART, args.seed) as server,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=args.minutes)

        def log(what: str) -> None:
            progress.update(task, description=what, completed=(time.monotonic() - begin) / 60)

        soak = Soak(Path(folder), server.url, args.seed, until, log)
        while time.monotonic() < until:
            soak.one_run()
        text = report(soak.tally, server.failures, args.seed, (time.monotonic() - begin) / 60)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 1 if soak.tally.wrong else 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
