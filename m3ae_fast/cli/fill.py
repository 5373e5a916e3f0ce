"""Fill in the masked text tokens of a caption, and the missing patches of an image.

m3ae-fast fill runs/large photo.jpg "a [MASK] on the table"
m3ae-fast fill runs/large photo.jpg "a cat on the table" --visible 0.25 --out completed.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import output, program, seed
from m3ae_fast.config import add_range_option
from m3ae_fast.weights.model_name import MASK, MODEL_HELP


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("fill", __doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="an image file; its central square is taken, or all")
    parser.add_argument("text", metavar="TEXT", help=f"a caption; each {MASK} stands for one token")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="guesses per mask (default: 5)")
    parser.add_argument(
        "--visible",
        type=float,
        default=1.0,
        metavar="FRACTION",
        help="fraction of the patches that are seen (default: 1)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="decides which patches are seen")
    add_range_option(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="if the model has no tokenizer, or to replace it")
    parser.add_argument(
        "--image-tokenizer",
        metavar="FOLDER",
        help="the VQGAN of a model that predicts image tokens, to draw --out (default: the run's)",
    )
    parser.add_argument(
        "--out", type=output(".png"), metavar="FILE.png", help="draw image, what was seen, and completion"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from m3ae_fast.evaluation.filling import fill

    found = fill(
        args.model,
        args.image,
        args.text,
        out=args.out,
        top=args.top,
        visible=args.visible,
        seed=args.seed,
        image_range=args.range,
        tokenizer=args.tokenizer,
        image_tokenizer=args.image_tokenizer,
    )
    for place, guesses in enumerate(found, 1):
        shown = "  ".join(f"{guess.token} {guess.probability:.1%}" for guess in guesses)
        print(f"{MASK} {place}: {shown}")
    if args.out:
        print(f"drew {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
