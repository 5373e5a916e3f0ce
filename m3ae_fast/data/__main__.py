"""Tools for shards.

python -m m3ae_fast.data index SHARDS...
    Write the index of every shard and print what is in them.

python -m m3ae_fast.data train-tokenizer SHARDS... --vocab-size 4096 --out tokenizer.json
    Train a lower-cased WordPiece tokenizer on the shards' captions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m3ae_fast.config import MAX_VOCAB, SourceConfig
from m3ae_fast.data.bad_samples import BadSample
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shards import ShardStore, expand
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.model.tokenizer import SPECIAL, train_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m3ae_fast.data", description="Tools for shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("shards", nargs="+", help="tars: paths, brace patterns, globs, URLs or pipe: commands")
    common.add_argument("--cache-dir", type=Path, help="where copies of remote shards go (default: ~/.cache/m3ae_fast)")
    index = commands.add_parser("index", parents=[common], help="write the shards' indexes and show what is in them")
    index.set_defaults(run=_index)
    train = commands.add_parser("train-tokenizer", parents=[common], help="train a WordPiece tokenizer on the captions")
    train.add_argument("--vocab-size", type=int, required=True, help="tokens at most, special ones included")
    train.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    train.set_defaults(run=_train_tokenizer)
    return parser


def _index(args: argparse.Namespace) -> None:
    shards = index_shards(expand(args.shards), ShardStore(args.cache_dir), progress=True)
    table = Table("shard", "modality")
    for name in ("samples", "paired", "picture alone", "caption alone", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("damage")
    totals = [0] * 5
    for shard in shards:
        found = shard.summary
        alone = found.images - found.paired, found.captions - found.paired
        counts = [found.samples, found.paired, *alone, found.size]
        totals = [total + count for total, count in zip(totals, counts)]
        modality = found.modality if found.samples else "-"
        table.add_row(escape(shard.shard), modality, *(f"{n:,}" for n in counts), escape(found.damage or ""))
    table.add_section()
    table.add_row(f"{len(shards):,} shards", "", *(f"{n:,}" for n in totals), "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _train_tokenizer(args: argparse.Namespace) -> None:
    if not len(SPECIAL) < args.vocab_size <= MAX_VOCAB:
        raise UserError(
            f"--vocab-size {args.vocab_size}: must be above {len(SPECIAL)}, the number of special tokens, "
            f"and at most {MAX_VOCAB}"
        )
    tokenizer = train_tokenizer(list(_captions(args.shards, ShardStore(args.cache_dir))), args.vocab_size)
    if tokenizer.get_vocab_size() > args.vocab_size:
        raise UserError(
            f"--vocab-size {args.vocab_size}: the captions' characters alone need {tokenizer.get_vocab_size()}"
        )
    try:
        tokenizer.save(str(args.out))
    except Exception as error:  # the library raises just that
        raise UserError(f"--out {args.out}: cannot be written ({error})") from None
    print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens")


def _captions(shards: list[str], store: ShardStore) -> Iterator[str]:
    corpus = open_corpus([SourceConfig(shards=shards, modality="text")], store, progress=True)
    for source in corpus.sources:
        reader = Reader(source, store)
        for sample in range(sum(source.sizes)):
            try:
                yield reader.read(*reader.find(sample)).caption or ""
            except (BadSample, OSError):
                continue  # counted where it matters, in training


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
