"""Study segmentation with frozen patch features, on images with exact masks: emoji on crops of clip art.

python -m lab.segmentation --out runs/segmentation     # downloads the emoji with npm
python -m lab.segmentation --packages FOLDER           # FOLDER contains emoji-datasource-VENDOR-16.0.0.tgz
python -m lab.segmentation --minutes 20                # no run starts after 20 minutes; the next call continues

An MAE and an M3AE are pre-trained. `evaluate segment` compares them with random weights, with the pixels of each patch
and with the largest class. The protocol is in lab/segmentation/README.md. segmentation.json, segmentation.png and
README.md are written after each encoder. Completed training runs and tests are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from lab.segmentation import collage, report
from lab.segmentation.run import SEEDS, SETTINGS, Study, plan
from lab.study.run import Stopped
from lab.trials import log
from m3ae_fast.base.errors import exit_cleanly


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.segmentation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--packages", type=Path, metavar="FOLDER", help="folder of the emoji packages (default: download them)")
    add("--out", type=Path, default=Path("runs/segmentation"), help="output folder (default: runs/segmentation)")
    add("--results", type=Path, metavar="DIR", help="output folder for the tables and the figure (default: --out)")
    add("--seeds", type=int, default=SEEDS, metavar="N", help=f"number of seeds (default: {SEEDS})")
    add("--minutes", type=float, metavar="N", help="start no training or test after N minutes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    started, settings = time.monotonic(), json.loads(SETTINGS.read_text(encoding="utf-8"))
    shards = args.out / "shards"
    classes = collage.prepare(args.packages or args.out / "packages", shards, download=args.packages is None)
    study, folder = Study(args.out, shards, settings), args.results or args.out

    def write() -> None:
        head: dict[str, Any] = {"about": results.about(), "settings": settings}
        report.save(folder, head, study, args.seeds, classes)

    left = [trial for trial in plan(args.seeds) if not study.done(trial)]
    for trial in left:
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; run the same command again to continue")
            break
        log(study.folder(trial).name)
        try:
            study.perform(trial)
        except Stopped:
            print("stopped; run the same command again to continue")
            return 1
        write()
    write()
    print(f"see {folder / report.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
