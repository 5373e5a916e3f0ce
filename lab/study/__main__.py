"""What text gives a masked autoencoder's representation, after the paper (arXiv 2205.14204), at a small size.

python -m lab.study                               # on the images that come with the project
python -m lab.study DATA --out runs/study         # on DATA/train-*.tar and DATA/val-*.tar
python -m lab.study DATA --minutes 75             # begin nothing after 75 minutes; the next call goes on
python -m lab.study --arms fractions ratios       # what figures 3 and 5 of the paper compare
python -m lab.study --set train.train.steps=3000 --set train.model.emb_dim=384

Pre-trains encoders (m3ae_fast.train) and tests them (m3ae_fast.transfer), one thing after the other, and writes
study.json, study.png and README.md after each. What is done is not done again: call it again after a stop.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from lab.study import report
from lab.study.plan import ARMS, Job, plan
from lab.study.run import SETTINGS, Stopped, Study
from lab.study.shards import captions_of, copy_shards, names_class
from m3ae_fast.config import SourceConfig
from m3ae_fast.config.load import apply_override
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.labels import LEFT_OUT, Label, read_labels
from m3ae_fast.errors import UserError, exit_cleanly

TITLE = "What text gives a masked autoencoder"
BUNDLED = Path("data/openclipart")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, nargs="?", default=BUNDLED, metavar="DATA",
        help=f"folder of openclipart's train-*.tar and val-*.tar (default: {BUNDLED})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for runs (default: runs/study)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder for tables and plot (default: --out)")
    parser.add_argument("--labels", default="json.label", metavar="cls|json.FIELD", help="default: json.label")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each encoder (default: 3)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what is compared (default: all)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no job after so many minutes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of settings.json"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch._dynamo.config.recompile_limit = 64  # models of several sizes share compiled code in this process
    study, data = set_up(args)
    common = study.common
    everything = plan(common.width, common.steps, args.seeds)
    jobs = plan(common.width, common.steps, args.seeds, args.arms)
    started, pace = time.monotonic(), Pace()
    folder = args.results or args.out

    def write() -> None:
        head = {"title": TITLE, "about": results.about(), "data": data, "settings": study.settings}
        report.save(folder, head | study.results(everything))

    left = [job for job in jobs if not study.done(job)]
    say(f"{len(jobs)} jobs, {len(jobs) - len(left)} done; runs in {study.out}")
    for number, job in enumerate(left):
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            say(f"{args.minutes:g} minutes are over: {len(left) - number} jobs are left for the next call")
            break
        say(f"[{len(jobs) - len(left) + number + 1}/{len(jobs)}] {job.name}; {pace.left(left[number:])}")
        began = time.monotonic()
        try:
            study.perform(job)
        except Stopped:
            say("stopped; call it again to go on")
            return 1
        pace.add(job, time.monotonic() - began)
        write()
    write()
    say(f"see {folder / report.PAGE}")
    return 0


def set_up(args: argparse.Namespace) -> tuple[Study, dict[str, Any]]:
    """Set up the study, and what its results say of the data.

    Raises:
        UserError: there are no such shards, or they have no labels.
    """
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    for override in args.set:
        apply_override(settings, override)
    train_shards, val_shards = (sorted(args.data.glob(f"{split}-*.tar")) for split in ("train", "val"))
    if not train_shards or not val_shards:
        raise UserError(f"{args.data}: has no train-*.tar and val-*.tar")
    side = 3 * settings["train"]["model"]["image_size"] // 2  # a crop of half the area is larger than the model's input
    whole, nameless = args.out / "whole", args.out / "nameless"
    copy_shards(train_shards + val_shards, whole, side)
    copy_shards(train_shards, nameless, side, nameless=True)
    study = Study(
        args.out, settings, f"{whole}/train-*.tar", f"{whole}/val-*.tar", f"{nameless}/train-*.tar", args.labels
    )
    captions = list(captions_of(train_shards))
    train, val = (labels(name, args.labels) for name in (study.train, study.val))
    frequent = Counter(train).most_common(1)[0][0]
    return study, {
        "training captions": len(captions),
        "of them naming a class": sum(map(names_class, captions)),
        "labelled training samples": len(train),
        "labelled test samples": len(val),
        "classes": len(set(train)),
        "chance": 1 / len(set(train)),
        "majority class": val.count(frequent) / len(val),
    }


def labels(shards: str, field: str) -> list[Label]:
    """Return the labels of the samples that have a class."""
    corpus = open_corpus([SourceConfig(shards=shards, modality="image")], ShardStore(None))
    return [label for source in read_labels(corpus, field) for label in source if label not in (None, LEFT_OUT)]


class Pace:
    """Says how long the rest takes, by what jobs of each kind have taken so far."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str | None, float] = defaultdict(float)
        self._work: defaultdict[str | None, float] = defaultdict(float)

    def add(self, job: Job, seconds: float) -> None:
        self._seconds[job.task] += seconds
        self._work[job.task] += job.work

    def left(self, jobs: list[Job]) -> str:
        known = [job for job in jobs if self._work[job.task]]
        seconds = sum(job.work * self._seconds[job.task] / self._work[job.task] for job in known)
        if len(known) < len(jobs):
            return f"{len(jobs)} jobs left"
        return f"{len(jobs)} jobs left, about {seconds / 60:.0f} minutes"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
