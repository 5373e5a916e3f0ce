"""Draw what a run has learnt: reconstructions, attention over images, or a map of features by class.

python -m m3ae_fast.visualise runs/large                                  # original, masked, reconstructed; captions
python -m m3ae_fast.visualise runs/large --ratios 0.5 0.75 0.9            # the same images at several mask ratios
python -m m3ae_fast.visualise runs/large attention --word dog             # of the cls token and of a word
python -m m3ae_fast.visualise runs/large map --labels json.label          # t-SNE of features, coloured by class

Samples lie evenly over the run's data.val (without it, data.train), or over --shards; a map has all that have a class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from m3ae_fast.command_line import add_labels, program
from m3ae_fast.config import Config, SourceConfig, parse
from m3ae_fast.config.transfer import EncodeConfig
from m3ae_fast.data import Corpus, Preparation, ShardStore, eval_samples, open_corpus, open_tokenizer
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.data.trust import require_harmless
from m3ae_fast.encoding import UNMASKED, encode_corpus
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.open_model import open_model
from m3ae_fast.pictures.attention import draw_attention
from m3ae_fast.pictures.figures import draw_map, require_matplotlib
from m3ae_fast.pictures.reconstructions import draw_run
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.run import checkpoint

_SEARCHED = 2000  # samples, for a word


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("visualise", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint is taken) or a checkpoint folder")
    parser.add_argument("what", nargs="?", choices=KINDS, default="reconstructions", help="default: reconstructions")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: RUN/WHAT.png")
    parser.add_argument("--pictures", type=int, default=12, help="samples shown (default: 12)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[], metavar="R", help="mask ratios of the image (default: the run's)"
    )
    parser.add_argument("--word", help="whose attention is shown (default: that of each caption's first words)")
    add_labels(parser)
    parser.add_argument("--shards", nargs="+", metavar="SHARDS", help="whose samples are drawn in place of the run's")
    parser.add_argument(
        "--trust", action="store_true", help="open whatever shards the run names, also those that run a program"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: must be 1 or more")
    if not all(0 <= ratio <= 1 for ratio in args.ratios):
        raise UserError(f"--ratios {' '.join(map('{:g}'.format, args.ratios))}: must be from 0 to 1")
    path = checkpoint.locate(Path(args.run))
    config = parse(Config, checkpoint.read_info(path).config, f"checkpoint {path}")
    sources, store = _shown(args, config, f"checkpoint {path}")
    if args.what == "map":
        sources = [source.model_copy(update={"modality": "image"}) for source in sources]
    corpus = open_corpus(sources, store, progress=True)
    out = args.out or Path(args.run) / f"{args.what}.png"
    KINDS[args.what](args, config, corpus, out)
    print(f"drew {out}")
    return 0


def _shown(args: argparse.Namespace, config: Config, where: str) -> tuple[list[SourceConfig], ShardStore]:
    """Return whose samples are drawn, and where copies of them go. Raises UserError if that takes more trust in the
    run."""
    sources = config.data.val or config.data.train
    if args.shards:
        return [sources[0].model_copy(update={"shards": args.shards})], ShardStore()
    if not args.trust:
        require_harmless(sources, config.data.cache_dir, where)
    return sources, ShardStore(config.data.cache_dir, config.data.cache_gb)


def _reconstructions(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    # the last weights, whose losses the run logged, not their moving average
    weights = checkpoint.read_weights(checkpoint.locate(Path(args.run)), average=False)
    draw_run(config, weights, corpus, open_tokenizer(config.data, config.model), out, args.pictures, args.ratios)


def _attention(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    model = open_model(args.run, text=bool(config.model.vocab_size), tokenizer=config.data.tokenizer).eval()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, config.run.seed)
    samples = eval_samples(corpus, preparation, _SEARCHED if args.word else args.pictures)
    draw_attention(model, samples, out, args.pictures, args.word)


def _map(args: argparse.Namespace, config: Config, corpus: Corpus, out: Path) -> None:
    require_matplotlib()
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("a map needs scikit-learn: pip install 'm3ae-fast[transfer]'") from None
    labelled, classes = label_corpus(corpus, args.labels, progress=True)
    with join_ranks() as ranks:
        model = open_model(args.run, text=False).to(ranks.device)
        found = encode_corpus(model, labelled, config.data, EncodeConfig(), ranks)
    assert found.labels_N is not None
    if len(found.keys) < 4:
        raise UserError(f"{len(found.keys)} samples have a class: a map needs 4 or more")
    perplexity = min(30.0, (len(found.keys) - 1) / 3)
    places_N2 = TSNE(init="pca", perplexity=perplexity, random_state=config.run.seed).fit_transform(found.features_ND)
    draw_map(out, places_N2, found.labels_N.numpy(), classes)


KINDS: dict[str, Callable[[argparse.Namespace, Config, Corpus, Path], None]] = {
    "reconstructions": _reconstructions,
    "attention": _attention,
    "map": _map,
}


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
