"""Look at the samples for the facts that settings depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m3ae_fast.batch.tokenizer import CaptionTokenizer, train_tokenizer
from m3ae_fast.config import Range, SourceConfig
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.errors import UserError
from m3ae_fast.pretraining.choices import TOKENIZER, Facts, Shards
from m3ae_fast.shard_tools.stats import collect, require_images
from m3ae_fast.shard_tools.tally import Tally
from m3ae_fast.shard_tools.tokenizer_training import caption_texts, save_tokenizer

_LOOKED_AT = 2000  # samples
_LONGEST = 1 << 16  # tokens
_VOCABULARY = (512, 16384)  # smallest and largest that is learnt
_QUANTILE = 0.95  # of the captions are not cut


def look(shards: Shards, out: Path, labels: str, image_range: Range | None = None) -> tuple[Facts, list[str]]:
    """Return facts and what to tell the user. Trains a tokenizer into the run folder `out` if there are captions.
    Raises UserError where the shards cannot be used, or no sample has an image."""
    store = ShardStore()
    train = open_corpus([SourceConfig(shards=shards.train)], store, progress=True)
    val = open_corpus([SourceConfig(shards=shards.val)], store, progress=True) if shards.val else None
    notes, tokenizer = [], None
    if train.has_captions:
        texts = list(caption_texts(shards.train, store, Tally()))
        wanted = 2 ** round(np.log2(max(len(texts), 1)))
        learnt = train_tokenizer(texts, int(np.clip(wanted, *_VOCABULARY)))
        save_tokenizer(learnt, out / TOKENIZER)
        tokenizer = CaptionTokenizer(learnt, _LONGEST)
    classes, note = _classes(shards, store, labels)
    notes += [note] if note else []
    found = collect(train, _LOOKED_AT, 0, 3, image_range, tokenizer, labels if classes else "cls")
    require_images(found)
    mean, std = found.mean_and_std()
    lengths = found.lengths or [1]
    return Facts(
        train.samples,
        val.samples if val else 0,
        int(np.median(np.array(found.sizes).min(1))),
        mean,
        std,
        classes,
        tokenizer.vocab_size if tokenizer else 0,
        int(np.clip(8 * np.ceil(np.quantile(lengths, _QUANTILE) / 8), 8, 64)),
    ), notes


def _classes(shards: Shards, store: ShardStore, labels: str) -> tuple[int, str]:
    """Return how many classes both parts have, 0 where their labels cannot be used, and why not."""
    if not shards.val:
        return 0, ""
    none = "there is no k-NN accuracy and no linear probe"
    if shards.unlabelled and labels == "cls":
        return 0, f"{none}: {shards.unlabelled}"
    try:
        train, val = (
            open_corpus([SourceConfig(shards=part, modality="image")], store) for part in (shards.train, shards.val)
        )
        _, classes = label_corpus(train, labels)
        label_corpus(val, labels, classes)
    except UserError as error:
        return 0, f"{none}: {error}"
    return len(classes), ""
