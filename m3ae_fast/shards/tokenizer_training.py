"""Training of a WordPiece tokenizer on the captions of shards."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.tokenizer import SPECIAL, train_tokenizer, write_tokenizer
from m3ae_fast.config import MAX_VOCAB, SourceConfig
from m3ae_fast.config.arguments import accepts
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.shards.options import TokenizerOptions
from m3ae_fast.shards.problem_counts import REFUSED, Tally

_SHARDS = 16  # minimum number of shards from which a subset of the captions is read
FEW = 0.9  # a note is printed if a tokenizer has fewer than this fraction of the requested tokens


class TrainedTokenizer(NamedTuple):
    """The result of training a tokenizer."""

    path: Path
    size: int  # number of tokens, which is the value of model.vocab_size
    captions: int
    tally: Tally  # counts of samples whose captions are invalid, empty or too long


@accepts(TokenizerOptions)
def tokenizer(shards: str | Sequence[str], out: str | os.PathLike[str], **options: Any) -> TrainedTokenizer:
    """Train a lower-cased WordPiece tokenizer on the captions of shards, write it as a tokenizer.json, and return a
    summary.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        out: the tokenizer.json to write.
        options: the other options of the command, such as `vocab_size=2048`: the fields of `options.TokenizerOptions`.

    Raises:
        UserError: no caption can be used, `vocab_size` is out of range or too small for the characters of the captions,
            or `out` cannot be written.
    """
    given = TokenizerOptions(shards=shards, out=out, **options)
    vocab_size, names, tally = given.vocab_size, list(given.shards), Tally()
    if not len(SPECIAL) < vocab_size <= MAX_VOCAB:
        raise UserError(
            f"--vocab-size {vocab_size}: must be above {len(SPECIAL)}, the number of special tokens, "
            f"and at most {MAX_VOCAB}"
        )
    texts = list(caption_texts(names, ShardStore(given.cache_dir), tally))
    if not texts:
        raise UserError(f"shards {' '.join(names)}: none of their captions contains a word")
    print(f"training a tokenizer on {counted(len(texts), 'caption')}", file=sys.stderr, flush=True)
    trained = train_tokenizer(texts, vocab_size)
    size = trained.get_vocab_size()
    if size > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the characters of the captions alone require {size} tokens; raise it"
        )
    save_tokenizer(trained, given.out)
    return TrainedTokenizer(given.out, size, len(texts), tally)


def describe_tokenizer(trained: TrainedTokenizer, vocab_size: int) -> list[str]:
    """Return the lines that describe a trained tokenizer to the user. `vocab_size`: the requested number of tokens."""
    size = trained.size
    lines = [f"{trained.path}: {size:,} tokens, trained on {trained.captions:,} captions; set model.vocab_size={size}"]
    if size < FEW * vocab_size:
        lines.append(f"fewer than the {vocab_size:,} requested tokens: the captions yield no more word pieces")
    return lines + trained.tally.lines()


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write a tokenizer.json atomically. Raises UserError if that fails."""
    with atomic_write(out) as partial:
        write_tokenizer(tokenizer, partial)


def caption_texts(shards: list[str], store: ShardStore, tally: Tally, most: int | None = None) -> Iterator[str]:
    """Yield the captions of shards: all of them, or those of about `most` samples from evenly spaced shards. Captions
    that are blank or invalid are left out and counted in `tally`. Raises UserError if the shards cannot be opened."""
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
    """Return sample numbers in file order: all samples, or about `most` samples from as few shards as possible, but
    from at least `_SHARDS`."""
    total, starts = int(sizes.sum()), np.cumsum(sizes) - sizes
    if most is None or total <= most:
        return range(total)
    count = min(max(_SHARDS, math.ceil(most / (total / len(sizes)))), len(sizes))
    found: list[int] = []
    for shard in np.linspace(0, len(sizes) - 1, count).round().astype(int).tolist():
        taken = min(math.ceil(most / count), int(sizes[shard]))
        found += (starts[shard] + np.linspace(0, sizes[shard] - 1, taken).round().astype(np.int64)).tolist()
    return found
