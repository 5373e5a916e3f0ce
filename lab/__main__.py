"""Train and test the trials of a list, and write a table of the results.

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab study data/labelled --out runs/study
python -m lab race data/labelled --out runs/race --arms official fast --seeds 1
python -m lab my-list.json data/labelled --out runs/mine   # the format is described in lab/README.md

Each trial is trained with m3ae_fast.train and tested with m3ae_fast.evaluate. results.json and README.md are written
after each trial. Trials that are complete are not repeated: if the program is stopped, run it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lab.report import write
from lab.trials import TrialList, perform, result_of
from m3ae_fast.base.errors import UserError, exit_cleanly

LISTS = Path(__file__).with_name("lists")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    known = sorted(path.stem for path in LISTS.glob("*.json"))
    parser = argparse.ArgumentParser(
        prog="python -m lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("list", metavar="LIST", help=f"list of trials: {', '.join(known)}, or a JSON file")
    add("data", type=Path, metavar="DATA", help="folder of the shards, as written by lab.labelled")
    add("--out", type=Path, required=True, metavar="DIR", help="output folder")
    add("--arms", nargs="+", metavar="ARM", help="run only these arms (default: all)")
    add("--seeds", type=int, metavar="N", help="maximum number of seeds (default: as in the list)")
    add("--minutes", type=float, metavar="N", help="start no trial after N minutes")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of all trials")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    path = Path(args.list)
    trial_list = TrialList.read(path if path.suffix == ".json" else LISTS / f"{args.list}.json", args.set)
    if unknown := {*(args.arms or ())} - {*trial_list.arms}:
        raise UserError(f"--arms {min(unknown)}: is not one of {', '.join(trial_list.arms)}")
    wanted = [
        trial
        for trial in trial_list.trials()
        if (args.arms is None or trial.arm in args.arms) and (args.seeds is None or trial.seed < args.seeds)
    ]
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for number, trial in enumerate(wanted, 1):
        if result_of(trial, args.out).exists():
            continue
        if until is not None and time.monotonic() > until:
            print(f"{args.minutes:g} minutes are over; run the same command again to continue")
            break
        print(f"{time.strftime('%H:%M:%S')}  [{number}/{len(wanted)}] {trial.name}", flush=True)
        if not perform(trial_list, trial, args.data, args.out):
            print("stopped; run the same command again to continue")
            return 1
        write(trial_list, args.out)
    write(trial_list, args.out)
    print(f"see {args.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
