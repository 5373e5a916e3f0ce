"""Study the effect of text on the representation of a masked autoencoder, as in the paper (arXiv 2205.14204), at a
small scale.

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab.study data/labelled --out runs/study
python -m lab.study data/labelled --minutes 75             # no run starts after 75 minutes; the next call continues
python -m lab.study data/labelled --arms fractions ratios  # the comparisons of figures 3 and 5 in the paper
python -m lab.study data/labelled --validation --out runs/tried --set train.optim.peak_lr=1e-3    # to choose settings

One after the other, encoders are pre-trained on emoji (m3ae_fast.train), with the names of the emoji as captions, and
tested on held-out emoji and Fashion-MNIST with the probes of m3ae_fast.evaluation. study.json, study.png and README.md
are written after each encoder. Completed encoders are not repeated: if the program is stopped, run it again. To
continue on another machine, copy the folder of --results to it and pass it as --results.
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
from lab.study import report
from lab.study.plan import ARMS, plan
from lab.study.run import SETTINGS, Stopped, Study
from lab.study.shards import FOLDS, LABELS, prepare
from lab.trials import log
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.config.load import apply_override


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with fashion, twitter and google, written by lab.labelled"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), help="output folder for the runs (default: runs/study)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="output folder for the tables and the plot (default: --out)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, FOLDS + 1),
        default=FOLDS,
        help=f"number of seeds per encoder (default: {FOLDS})",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="comparisons to run (default: all)")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no encoder after N minutes")
    parser.add_argument(
        "--validation",
        action="store_true",
        help="evaluate on validation samples, which are not part of the test sets; runs are in --out/validation",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of settings.json"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    for override in args.set:
        apply_override(settings, override)
    shards, started = args.out / "shards", time.monotonic()
    prepare(args.data, shards, 3 * settings["train"]["model"]["image_size"] // 2)
    labels = json.loads((shards / LABELS).read_text(encoding="utf-8"))
    out = args.out / "validation" if args.validation else args.out
    study = Study(out, shards, settings, args.validation)
    common = study.common
    everything = plan(common.width, common.steps)
    wanted = plan(common.width, common.steps, args.seeds, args.arms)
    folder = args.results or out
    study.adopt(report.read_answers(folder, settings, args.validation))

    def write() -> None:
        head: dict[str, Any] = {"about": results.about(), "settings": settings, "validation": args.validation}
        report.save(folder, head, study.results(everything), labels)

    left = [encoder for encoder in wanted if not study.done(encoder)]
    log(f"{len(wanted)} encoders, {len(wanted) - len(left)} done; runs in {study.out}")
    for number, encoder in enumerate(left):
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            log(f"{args.minutes:g} minutes are over: {len(left) - number} encoders are left for the next call")
            break
        log(f"[{len(wanted) - len(left) + number + 1}/{len(wanted)}] {encoder.name}")
        try:
            study.perform(encoder)
        except Stopped:
            log("stopped; run the same command again to continue")
            return 1
        write()
    write()
    log(f"see {folder / report.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
