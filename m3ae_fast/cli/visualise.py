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
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.cli.command_line import add_labels, output, program

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from m3ae_fast.config import Config, ModelConfig, SourceConfig
    from m3ae_fast.data import Corpus, ShardStore
    from m3ae_fast.drawing.attention import Look

MAP_NEEDS = dict.fromkeys(("sklearn", "scipy"), "a map")
_SEARCHED = 2000  # samples, for a word
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
    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: must be 1 or more")
    if args.samples is not None and args.samples < 4:
        raise UserError(f"--samples {args.samples}: a map needs 4 or more")
    if not all(0 <= ratio <= 1 for ratio in args.ratios):
        raise UserError(f"--ratios {' '.join(map('{:g}'.format, args.ratios))}: must be from 0 to 1")
    if args.what == "map":
        require_libraries(MAP_NEEDS)
    from m3ae_fast import checkpoint
    from m3ae_fast.config import Config, parse
    from m3ae_fast.data import open_corpus

    path = checkpoint.locate(Path(args.run))
    config = parse(Config, checkpoint.read_info(path).config, f"checkpoint {path}")
    sources, store = _shown(args, config, f"checkpoint {path}")
    if args.what == "map":
        sources = [source.model_copy(update={"modality": "image", "caption_fraction": 1.0}) for source in sources]
    corpus = open_corpus(sources, store, progress=True)
    out = args.out or Path(args.run) / f"{args.what}.png"
    KINDS[args.what](args, config, corpus, out)
    print(f"drew {out}")
    return 0


def _shown(args: argparse.Namespace, config: Config, where: str) -> tuple[list[SourceConfig], ShardStore]:
    """Return whose samples are drawn, and where copies go. Raises UserError if that takes more trust in the run."""
    from m3ae_fast.data import ShardStore
    from m3ae_fast.data.untrusted import require_harmless

    sources = config.data.val or config.data.train
    if args.shards:
        return [sources[0].model_copy(update={"shards": args.shards, "caption_fraction": 1.0})], ShardStore()
    if not args.trust:
        require_harmless(sources, config.data.cache_dir, where)
    return sources, ShardStore(config.data.cache_dir, config.data.cache_gb)


def _reconstructions(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    from m3ae_fast import checkpoint
    from m3ae_fast.data import open_tokenizer
    from m3ae_fast.drawing.reconstructions import draw_run

    # the last weights, whose losses the run logged, not their moving average
    weights = checkpoint.read_weights(checkpoint.locate(Path(args.run)), average=False)
    tokenizer = open_tokenizer(config.data, config.model)
    if not draw_run(config, weights, corpus, tokenizer, out, args.pictures, args.ratios):
        raise UserError("none of the samples can be used; m3ae-fast data stats SHARDS says why")


def _attention(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    from m3ae_fast.data import Preparation, eval_samples
    from m3ae_fast.data.dataset import UNMASKED
    from m3ae_fast.drawing.attention import draw_attention, draw_patch_attention
    from m3ae_fast.weights.open_model import open_model

    look, patch = _look(args, config.model), _patch(args.patch, config.model)
    text = bool(config.model.vocab_size) or patch is not None
    model = open_model(args.run, text=text, tokenizer=config.data.tokenizer).eval()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, config.run.seed)
    samples = eval_samples(corpus, preparation, _SEARCHED if args.word else args.pictures)
    if patch:
        draw_patch_attention(model, samples, out, args.pictures, patch, look, config.data.show_channels)
    else:
        draw_attention(model, samples, out, args.pictures, args.word, look, config.data.show_channels)


def _look(args: argparse.Namespace, model: ModelConfig) -> Look:
    """Return whose attention is asked for. Raises UserError if the model has no such block or head."""
    from m3ae_fast.drawing.attention import Look

    for name, most in (("layer", model.depth), ("head", model.num_heads)):
        if (number := getattr(args, name)) is not None and not 1 <= number <= most:
            raise UserError(f"--{name} {number}: the encoder has {most}, counted from 1")
    return Look((args.layer or model.depth) - 1, args.head and args.head - 1)


def _patch(given: str | None, model: ModelConfig) -> tuple[int, int] | None:
    """Return row and column of a patch, from 0. Raises UserError if the model has no such patch."""
    if given is None:
        return None
    side = model.longest_side
    found = re.fullmatch(r"(\d{1,5}),(\d{1,5})", given)
    if not found or max(place := (int(found[1]), int(found[2]))) >= side:
        raise UserError(f"--patch {given}: must be row and column from 0,0 to {side - 1},{side - 1}")
    return place


def _map(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    from m3ae_fast.data.labels import class_names, keep_classes, label_corpus
    from m3ae_fast.evaluation.feature_map import draw_feature_map

    labelled, classes = label_corpus(corpus, args.labels, gaps=True, progress=True)
    if args.classes is not None:
        labelled, classes = keep_classes(labelled, classes, args.classes.split(","))
    names = class_names(labelled, classes)
    draw_feature_map(out, args.runs, labelled, names, config.data, config.run.seed, args.samples)


KINDS: dict[str, Callable[[argparse.Namespace, Config, Corpus, Path], None]] = {
    "reconstructions": _reconstructions,
    "attention": _attention,
    "map": _map,
}


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
