"""Pre-train on pictures, in one line: shards, tokenizer, held-out part, sizes, length, evaluation, report and export.

m3ae-fast pretrain photos/ --out run                      # captions beside the images or in a table; classes: folders
m3ae-fast pretrain imagenette2/ --out run                 # train/CLASS and val/CLASS: what is in val is held out
m3ae-fast pretrain 'shards/*.tar' --out run --hours 8
m3ae-fast pretrain uoft-cs/cifar10 --out run              # a data set of the Hugging Face hub
m3ae-fast pretrain photos/ --out run --from runs/base     # continues from existing weights: a run, an export, MAE's ...
m3ae-fast pretrain photos/ --out run --dry-run            # what would be chosen, and how long it takes

The chosen settings are printed and written to OUT/config.json, which can be passed to `m3ae-fast train --config`.
If it is interrupted, run the same command again to resume. In Python: m3ae_fast.pretrain("photos/", out="run").
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_labels, add_settings, output, program, use_device
from m3ae_fast.pretraining import GOES_ON
from m3ae_fast.pretraining.automatic_settings import check_overrides


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("pretrain", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder of images, shards, or a data set's name")
    parser.add_argument("--out", type=output(), required=True, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--hours", type=float, default=0.5, help="for everything, on this machine: training adapts to it (default: 0.5)"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="TABLE", help=".csv, .tsv, .jsonl or .parquet (default: one in the folder)"
    )
    parser.add_argument(
        "--val", nargs="+", default=[], metavar="SHARDS", help="held-out samples, where SOURCE is shards"
    )
    add_labels(parser)
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="MODEL",
        help="continue from these weights, with a lower learning rate: a run, an export, weights of the official M3AE "
        "or MAE or of a timm model, or a name on the hub (default: random weights)",
    )
    add_settings(parser, "train.global_batch=64")
    parser.add_argument(
        "--tune", action="store_true", help="choose the learning rate by short runs first: 15%% of the training time"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="create the shards, print the settings that would be chosen and the expected duration, and exit",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_overrides(args.set)  # a mistake is told before the imports, which take seconds
    try:
        finished = _pretrain(args)
    except KeyboardInterrupt:
        print(f"stopped; {GOES_ON}", file=sys.stderr)
        return 130
    if not (finished or args.dry_run):
        print(f"stopped; {GOES_ON}")
    return 0


def _pretrain(args: argparse.Namespace) -> bool:
    """Return whether the run is finished."""
    use_device(args.device)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the imports of libraries do not heed it well
    from m3ae_fast.pretraining.stages import pretrain

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return pretrain(
        args.source,
        args.out,
        hours=args.hours,
        captions=args.captions,
        val=args.val,
        labels=args.labels,
        start_from=args.start_from,
        overrides=args.set,
        tune=args.tune,
        dry_run=args.dry_run,
    ).finished


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
