"""Draw figures of a model: reconstructions, attention, a map of the features, filled-in words and patches.

m3ae-fast draw reconstructions runs/large                       # original, masked, reconstructed; captions
m3ae-fast draw reconstructions runs/large --ratios 0.5 0.75     # the same images at several mask ratios
m3ae-fast draw attention runs/large --word dog                  # from the cls token and a word to the patches
m3ae-fast draw attention runs/large --patch 3,5 --head 2        # from a patch to the words, in one head
m3ae-fast draw map runs/large --labels json.label               # t-SNE of features, coloured by class
m3ae-fast draw map runs/mae runs/m3ae --classes cat,dog         # maps of several runs, side by side
m3ae-fast draw fill runs/large photo.jpg "a [MASK] on the table"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.cli.command_line import add_device, add_labels, command, output, program, seed
from m3ae_fast.config import add_range_option
from m3ae_fast.evaluation.tasks import MAP_NEEDS
from m3ae_fast.weights.model_name import MASK, MODEL_HELP

RUN_HELP = "a run folder (its last checkpoint is used) or a checkpoint folder"
OF_A_RUN = "Samples are selected evenly from --val (default: the run's data.val or, if it is empty, its data.train)."
MAP = f"""t-SNE of the features of all samples that have a class. With several runs, the maps of all runs are drawn side
by side, with the samples of the first run. {OF_A_RUN}
"""
FILL = """Predict the masked words of a caption, and complete the missing patches of an image.

  m3ae-fast draw fill runs/large photo.jpg "a [MASK] on the table"
  m3ae-fast draw fill runs/large photo.jpg "a cat on the table" --visible 0.25 --out completed.png
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("draw", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_run = _options_of_a_run()
    _add_reconstructions(commands, of_run)
    _add_attention(commands, of_run)
    _add_map(commands, of_run)
    _add_fill(commands)
    return parser.parse_args(argv)


def _options_of_a_run() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=output(".png"), metavar="FILE.png", help="output file (default: RUN/COMMAND.png)")
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
    parser.add_argument(
        "--head", type=int, metavar="N", help="attention head, counted from 1 (default: mean over all heads)"
    )


def _add_map(commands: Any, of_run: argparse.ArgumentParser) -> None:
    parser = command(commands, "map", "t-SNE of features, coloured by class", MAP, _map, of_run)
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    add_labels(parser)
    parser.add_argument("--classes", metavar="A,B,...", help="classes to draw (default: all)")
    text = "maximum number of samples in the map (default: all samples with a class)"
    parser.add_argument("--samples", type=int, metavar="N", help=text)
    add_device(parser)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=12, help="number of samples to draw (default: 12)")


def _add_fill(commands: Any) -> None:
    parser = command(commands, "fill", "predict masked words of a caption, and complete an image", FILL, _fill)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "image",
        metavar="IMAGE",
        type=Path,
        help="image file; models for square images use its central square, and models with native aspect ratio use "
        "the whole image",
    )
    parser.add_argument("text", metavar="TEXT", help=f"caption; each {MASK} stands for one token")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of predictions printed per mask (default: 5)"
    )
    parser.add_argument(
        "--visible",
        type=float,
        default=1.0,
        metavar="FRACTION",
        help="fraction of the patches that are visible (default: 1)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="random seed for choosing the visible patches (default: 0)"
    )
    add_range_option(parser)
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer of the captions (default: the model's tokenizer)"
    )
    parser.add_argument(
        "--image-tokenizer",
        metavar="FOLDER",
        help="VQGAN that decodes the predicted image tokens for --out (default: the VQGAN of the run)",
    )
    parser.add_argument(
        "--out",
        type=output(".png"),
        metavar="FILE.png",
        help="write a figure with the image, the visible patches and the completion",
    )


def _reconstructions(args: argparse.Namespace) -> Path:
    from m3ae_fast.evaluation.run_figures import reconstructions

    return reconstructions(args.run, pictures=args.pictures, ratios=args.ratios, **_source(args))


def _attention(args: argparse.Namespace) -> Path:
    from m3ae_fast.evaluation.run_figures import attention

    whose = {name: getattr(args, name) for name in ("pictures", "word", "patch", "layer", "head")}
    return attention(args.run, **whose, **_source(args))


def _map(args: argparse.Namespace) -> Path:
    require_libraries(MAP_NEEDS)  # reports a missing library before the imports, which take seconds
    from m3ae_fast.evaluation.run_figures import feature_map

    classes = None if args.classes is None else args.classes.split(",")
    chosen = {"labels": args.labels, "classes": classes, "samples": args.samples, "device": args.device}
    return feature_map(args.runs, **chosen, **_source(args))


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"out": args.out, "shards": args.val, "trust": args.trust}


def _fill(args: argparse.Namespace) -> Path | None:
    from m3ae_fast.evaluation.fill_in import fill

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
    return args.out


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if path := args.perform(args):
        print(f"drew {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
