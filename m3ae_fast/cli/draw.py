"""Draw figures of a run or of an exported model: reconstructions and attention.

m3ae-fast draw reconstructions runs/large                       # original, masked, reconstructed; captions
m3ae-fast draw reconstructions runs/large --ratios 0.5 0.75     # the same images at several mask ratios
m3ae-fast draw reconstructions export/ --val 'shards/val-*.tar' --out export.png
m3ae-fast draw attention runs/large --word dog                  # from the cls token and a word to the patches
m3ae-fast draw attention runs/large --patch 3,5 --layer 2       # from a patch to the words, in the second block
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import command, program
from m3ae_fast.config.arguments import output

RUN_HELP = "a run folder (its last checkpoint is used), a checkpoint folder, or an export (with --val and --out)"
OF_A_RUN = "Samples are selected evenly from --val (default: the run's data.val or, if it is empty, its data.train)."


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("draw", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_run = _options_of_a_run()
    _add_reconstructions(commands, of_run)
    _add_attention(commands, of_run)
    return parser.parse_args(argv)


def _options_of_a_run() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--out",
        type=output(".png"),
        metavar="FILE.png",
        help="output file (default: reconstructions.png or attention.png in RUN)",
    )
    parser.add_argument(
        "--val", nargs="+", default=(), metavar="SHARDS", help="samples to draw (default: samples of the run)"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open all shards named in the run's config, including `pipe:` shards, which execute commands",
    )
    return parser


def _add_reconstructions(commands: Any, of_run: argparse.ArgumentParser) -> None:
    summary = "samples, their masked input, and the reconstruction"
    parser = command(commands, "reconstructions", summary, OF_A_RUN, _reconstructions, of_run)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_pictures(parser)
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[],
        metavar="R",
        help="mask ratios of the image (default: the mask ratio of the run)",
    )


def _add_attention(commands: Any, of_run: argparse.ArgumentParser) -> None:
    summary = "attention of words over patches, or of a patch over words"
    parser = command(commands, "attention", summary, OF_A_RUN, _attention, of_run)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_pictures(parser)
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--word", help="word whose attention over the patches is drawn (default: the first words of each caption)"
    )
    whose.add_argument(
        "--patch",
        metavar="R,C",
        help="patch whose attention over the words is drawn: its row and column, counted from 0",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="encoder block whose attention is drawn, counted from 1 (default: the last)",
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=12, help="number of samples to draw (default: 12)")


def _reconstructions(args: argparse.Namespace) -> Path:
    from m3ae_fast.evaluation.run_figures import reconstructions

    return reconstructions(args.run, pictures=args.pictures, ratios=args.ratios, **_source(args))


def _attention(args: argparse.Namespace) -> Path:
    from m3ae_fast.evaluation.run_figures import attention

    whose = {name: getattr(args, name) for name in ("pictures", "word", "patch", "layer")}
    return attention(args.run, **whose, **_source(args))


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"out": args.out, "shards": args.val, "trust": args.trust}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(f"drew {args.perform(args)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
