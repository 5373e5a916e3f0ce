"""A WordPiece tokenizer of the shards' captions."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from m3ae_fast.base.atomic_file import whole_file
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.batch.tokenizer import SPECIAL, train_tokenizer
from m3ae_fast.config import MAX_VOCAB, SourceConfig
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.shards.problem_counts import REFUSED, Tally

_SHARDS = 16  # that a part of the captions is read from
FEW = 0.9  # of the tokens requested; below it a note is printed


def run(args: argparse.Namespace) -> None:
    if not len(SPECIAL) < args.vocab_size <= MAX_VOCAB:
        raise UserError(
            f"--vocab-size {args.vocab_size}: must be above {len(SPECIAL)}, the number of special tokens, "
            f"and at most {MAX_VOCAB}"
        )
    tally = Tally()
    texts = list(caption_texts(args.shards, ShardStore(args.cache_dir), tally))
    if not texts:
        raise UserError(f"shards {' '.join(args.shards)}: no caption in them has a word")
    print(f"training a tokenizer of {len(texts):,} captions", file=sys.stderr, flush=True)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    size = tokenizer.get_vocab_size()
    if size > args.vocab_size:
        raise UserError(f"--vocab-size {args.vocab_size}: the captions' characters alone need {size}")
    save_tokenizer(tokenizer, args.out)
    print(f"{args.out}: {size:,} tokens of {len(texts):,} captions; set model.vocab_size={size}")
    if size < FEW * args.vocab_size:
        print(f"fewer than the {args.vocab_size:,} requested: the captions yield no more words and word pieces")
    print(*tally.lines(), sep="\n", end="\n" if tally.counts else "")


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write a tokenizer.json that is whole or not there. Raises UserError if that is not possible."""
    with whole_file(out) as partial:
        try:
            tokenizer.save(str(partial))
        except Exception as error:  # the library raises just that
            raise UserError(f"--out {out}: cannot be written ({error})") from None


def caption_texts(shards: list[str], store: ShardStore, tally: Tally, most: int | None = None) -> Iterator[str]:
    """Yield all captions of some shards, or those of about `most` samples of shards that are evenly spaced; those that
    are blank or cannot be used are left out and counted in `tally`."""
    corpus = open_corpus([SourceConfig(shards=shards, modality="text")], store, progress=True)
    for source in corpus.sources:
        reader = Reader(source, store)
        for sample in track(_spaced(source.sizes, most), "reading captions"):
            shard, row = reader.find(sample)
            name = f"{source.shards[shard].shard} sample {row}"
            try:
                name = f"{source.shards[shard].shard}/{reader.key(shard, row)}"
                caption = reader.read(shard, row).caption or ""
            except (BadSample, OSError) as error:
                tally.add(REFUSED, f"{name}: {error}")
                continue
            tally.add_caption(caption, name)
            if caption.strip():
                yield caption


def _spaced(sizes: np.ndarray, most: int | None) -> Sequence[int]:
    """Return numbers of samples in file order: all, or about `most` of the fewest shards that have so many, but of
    `_SHARDS` at least."""
    total, starts = int(sizes.sum()), np.cumsum(sizes) - sizes
    if most is None or total <= most:
        return range(total)
    count = min(max(_SHARDS, math.ceil(most / (total / len(sizes)))), len(sizes))
    found: list[int] = []
    for shard in np.linspace(0, len(sizes) - 1, count).round().astype(int).tolist():
        taken = min(math.ceil(most / count), int(sizes[shard]))
        found += (starts[shard] + np.linspace(0, sizes[shard] - 1, taken).round().astype(np.int64)).tolist()
    return found
