"""Pre-train a model with one command: shards, tokenizer, settings, training, evaluation, report and export.

m3ae-fast pretrain photos/ --out run                      # captions: NAME.txt next to NAME.jpg; classes: sub-folders
m3ae-fast pretrain photos/ --out run --captions table.csv --labels json.category   # from columns of a table
m3ae-fast pretrain imagenette2/ --out run                 # train/CLASS and val/CLASS: the images in val are held out
m3ae-fast pretrain 'shards/*.tar' --out run --hours 8
m3ae-fast pretrain uoft-cs/cifar10 --out run              # a dataset on the Hugging Face Hub
m3ae-fast pretrain photos/ --out run --from runs/base     # continue from existing weights: a run, an export, MAE, ...
m3ae-fast pretrain photos/ --out run --dry-run            # print the chosen settings and the expected duration

The chosen settings are printed and written to OUT/config.json, which can be passed to `m3ae-fast train --config`.
If the command is interrupted, run it again to resume. In Python: m3ae_fast.pretrain("photos/", out="run").
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import (
    GROUP_HELP,
    add_columns,
    add_labels,
    add_settings,
    program,
    refuse,
    use_device,
)
from m3ae_fast.config.arguments import output
from m3ae_fast.config.recipes import HELP, NAMES
from m3ae_fast.pretraining import RESUME_NOTE, SEVERAL_RANKS
from m3ae_fast.pretraining.automatic_settings import check_overrides
from m3ae_fast.pretraining.recipes import check_recipe
from m3ae_fast.process.launchers import alone


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("pretrain", __doc__)
    text = "a folder of images, shards, an HDF5 file, or a Hugging Face dataset (a name on the Hub, or a folder)"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument("--out", type=output(), required=True, metavar="OUT", help="the run folder")
    text = "time limit in hours for all stages on this machine; the training length is adapted to it (default: 0.5)"
    parser.add_argument("--hours", type=float, default=0.5, help=text)
    text = "table of captions, .csv, .tsv, .jsonl or .parquet (default: the table in the folder)"
    parser.add_argument("--captions", type=Path, metavar="TABLE", help=text)
    add_columns(parser)
    text = "held-out shards, if SOURCE consists of shards (default: those named val or test, or the last tenth)"
    parser.add_argument("--val", nargs="+", default=[], metavar="SHARDS", help=text)
    parser.add_argument("--group", metavar="FIELD", help=GROUP_HELP)
    add_labels(parser)
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="MODEL",
        help="initial weights: a run, an export, official M3AE or MAE weights, timm weights, or a name on the Hub; "
        "training then uses a lower learning rate (default: random weights); in Python: start_from",
    )
    parser.add_argument(
        "--recipe",
        choices=NAMES,
        help=f"{HELP} (default: fast, unless --from or a setting prevents it)",
    )
    add_settings(parser, "train.global_batch=64")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="create the shards, print the settings that would be chosen and the expected duration, and exit; OUT must "
        "not contain a run",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not alone():
        refuse(SEVERAL_RANKS)
    check_overrides(args.set, args.start_from)  # report mistakes before the imports, which take seconds
    check_recipe(args.recipe, args.set, args.start_from)
    try:
        finished = _pretrain(args)
    except KeyboardInterrupt:
        print(f"stopped; {RESUME_NOTE}", file=sys.stderr)
        return 130
    if not (finished or args.dry_run):
        print(f"stopped; {RESUME_NOTE}")
    return 0


def _pretrain(args: argparse.Namespace) -> bool:
    """Return whether the run is finished."""
    use_device(args.device)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # libraries handle SIGINT poorly while they are imported
    from m3ae_fast.pretraining.stages import pretrain

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return pretrain(
        args.source,
        args.out,
        hours=args.hours,
        captions=args.captions,
        image_column=args.image_column,
        caption_column=args.caption_column,
        val=args.val,
        group=args.group,
        labels=args.labels,
        start_from=args.start_from,
        recipe=args.recipe,
        overrides=args.set,
        device=args.device,
        dry_run=args.dry_run,
    ).finished


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
