"""Draw what a run has learnt: reconstructions, attention over images, or a map of features by class.

m3ae-fast visualise runs/large                                  # original, masked, reconstructed; captions
m3ae-fast visualise runs/large --ratios 0.5 0.75 0.9            # the same images at several mask ratios
m3ae-fast visualise runs/large attention --word dog             # of the cls token and of a word, over patches
m3ae-fast visualise runs/large attention --patch 3,5 --head 2   # of a patch over the words, by one head
m3ae-fast visualise runs/large map --labels json.label          # t-SNE of features, coloured by class
m3ae-fast visualise map runs/mae runs/m3ae --classes cat,dog    # of several runs beside each other

Samples lie evenly over the run's data.val (without it, data.train), or over --shards; a map has all that have a class.
"""

from __future__ import annotations

import argparse
import sys

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.cli.command_line import add_labels, output, program
from m3ae_fast.evaluation.tasks import MAP_NEEDS

KINDS = ("reconstructions", "attention", "map")
_OPTIONS_OF = {
    "pictures": ("reconstructions", "attention"),
    "ratios": ("reconstructions",),
    **dict.fromkeys(("word", "patch", "layer", "head"), ("attention",)),
    **dict.fromkeys(("classes", "samples", "labels"), ("map",)),
}  # what uses an option


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("visualise", __doc__)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|WHAT",
        help="a run folder (its last checkpoint is taken) or a checkpoint folder; for a map several, whose samples are "
        f"those of the first; and what to draw: {', '.join(KINDS)} (default: the first of these)",
    )
    parser.add_argument("--out", type=output(".png"), metavar="FILE.png", help="default: RUN/WHAT.png")
    parser.add_argument("--pictures", type=int, default=12, help="samples shown (default: 12)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[], metavar="R", help="mask ratios of the image (default: the run's)"
    )
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--word", help="whose attention is shown (default: that of each caption's first words)")
    whose.add_argument("--patch", metavar="R,C", help="whose attention over the words is shown: row and column, from 0")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="encoder block whose attention it is, from 1 (default: the last)"
    )
    parser.add_argument("--head", type=int, metavar="N", help="its attention head, from 1 (default: the mean over all)")
    parser.add_argument("--classes", metavar="A,B,...", help="the classes that a map shows (default: all)")
    parser.add_argument("--samples", type=int, metavar="N", help="that a map shows at most (default: all with a class)")
    add_labels(parser)
    parser.add_argument("--shards", nargs="+", metavar="SHARDS", help="whose samples are drawn in place of the run's")
    parser.add_argument(
        "--trust", action="store_true", help="open whatever shards the run names, also those that run a program"
    )
    args = parser.parse_args(argv)
    args.runs = [word for word in args.words if word not in KINDS]
    kinds = [word for word in args.words if word in KINDS] or ["reconstructions"]
    if len(kinds) > 1 or not args.runs:
        parser.error("name a run, and one thing to draw")
    args.run, args.what = args.runs[0], kinds[0]
    if len(args.runs) > 1 and args.what != "map":
        parser.error(f"{args.what} are of one run; a map can be of several")
    for name, what in _OPTIONS_OF.items():
        if args.what not in what and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name}: {args.what} does not use it; it is for {' and '.join(what)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.what == "map":
        require_libraries(MAP_NEEDS)  # a missing one is said before the imports, which take seconds
    from m3ae_fast.evaluation import run_figures

    source = {"out": args.out, "shards": args.shards or (), "trust": args.trust}
    if args.what == "reconstructions":
        path = run_figures.reconstructions(args.run, pictures=args.pictures, ratios=args.ratios, **source)
    elif args.what == "attention":
        whose = {name: getattr(args, name) for name in ("pictures", "word", "patch", "layer", "head")}
        path = run_figures.attention(args.run, **whose, **source)
    else:
        classes = None if args.classes is None else args.classes.split(",")
        path = run_figures.feature_map(args.runs, labels=args.labels, classes=classes, samples=args.samples, **source)
    print(f"drew {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
