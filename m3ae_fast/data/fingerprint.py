"""What a training stream is made of, in a few words that a checkpoint keeps."""

from __future__ import annotations

import hashlib
import json

import torch

from m3ae_fast.data.lanes import Layout
from m3ae_fast.data.opening import Data


def fingerprint(data: Data, layout: Layout) -> dict[str, str]:
    """By name, what must be unchanged for a resumed run: shards with sizes and order, weights of sources, tokenizers.

    Folders do not matter: shards may move.
    """
    shards = [
        [shard.shard.rpartition("/")[2], shard.summary.size, shard.summary.samples, modality]
        for source in data.train.sources
        for shard, modality in zip(source.shards, source.modalities)
    ]
    ends = [len(source.shards) for source in data.train.sources]
    what = _hash([shards, ends, data.train.weights])
    stream = {"data.train": f"{len(shards):,} shards with {data.train.samples:,} samples, {what}"}
    stream["data.order"] = str(layout)
    if data.tokenizer is not None:
        stream["data.tokenizer"] = f"{data.tokenizer.vocab_size:,} tokens, {_hash(data.tokenizer.definition)}"
    if data.image_tokenizer is not None:
        digest = hashlib.sha256()
        for name, tensor in data.image_tokenizer.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        stream["data.image_tokenizer"] = f"weights {digest.hexdigest()[:12]}"
    return stream


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
