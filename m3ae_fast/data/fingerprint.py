"""Fingerprint of the training data, which is stored in checkpoints."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone

from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.lane_count import Layout
from m3ae_fast.data.opening import Data
from m3ae_fast.model.pretrained import weights_digest

# names of the entries
DATA = (
    "data.train",
    "data.train.caption_fraction",
    "data.train.loss_weight",
    "data.train.labels",
    "data.order",
    "data.tokenizer",
    "data.image_tokenizer",
)
WRITTEN = "data.train.written"  # time at which the shards were last written


def fingerprint(data: Data, layout: Layout) -> dict[str, str]:
    """Return the properties of the data that must be unchanged when a run resumes, as text by name: the shards with
    their sizes and order, the weights and the loss weights of the sources, the fractions of captions, the labels and
    the tokenizers. The entry WRITTEN is also included, although it changes when the shards are copied.

    Folders are not included, because shards may be moved. Settings such as `data.flip` are not included either; see
    `checkpoint.resuming.SAMPLING`.
    """
    shards = [
        [shard.shard.rpartition("/")[2], shard.summary.size, shard.summary.samples, modality]
        for source in data.train.sources
        for shard, modality in zip(source.shards, source.modalities)
    ]
    ends = [len(source.shards) for source in data.train.sources]
    what = _hash([shards, ends, data.train.weights])
    stream = {"data.train": f"{len(shards):,} shards with {data.train.samples:,} samples, {what}"}
    fractions = [source.caption_fraction for source in data.train.sources]
    stream["data.train.caption_fraction"] = ", ".join(map(str, fractions))
    stream["data.train.loss_weight"] = ", ".join(f"{source.loss_weight:g}" for source in data.train.sources)
    stream[WRITTEN] = written(data.train)
    if labels := [source.labels.tolist() for source in data.train.sources if source.labels is not None]:
        stream["data.train.labels"] = f"{sum(map(len, labels)):,} labels, {_hash(labels)}"
    stream["data.order"] = str(layout)
    if data.tokenizer is not None:
        stream["data.tokenizer"] = f"{data.tokenizer.vocab_size:,} tokens, {_hash(data.tokenizer.definition)}"
    if data.image_tokenizer is not None:
        stream["data.image_tokenizer"] = f"weights {weights_digest(data.image_tokenizer.state_dict())}"
    return stream


def written(corpus: Corpus) -> str:
    """Return the time at which the newest local shard was written, and a hash of the modification times of all local
    shards in whole seconds. The modification times of remote shards are unknown."""
    local = [
        shard for source in corpus.sources for shard in source.indexed if not corpus.store.must_be_copied(shard.shard)
    ]
    seconds = [shard.summary.mtime_ns // 10**9 for shard in local]
    newest = datetime.fromtimestamp(max(seconds, default=0), timezone.utc)
    return f"{newest:%Y-%m-%d %H:%M:%S} UTC, {_hash(seconds)}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
