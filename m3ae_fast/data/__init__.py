"""From shards on disk or elsewhere to packed batches."""

from m3ae_fast.data.corpus import Corpus, Skipped, open_corpus
from m3ae_fast.data.loader import BadSamples, build_loader
from m3ae_fast.data.shards import ShardStore
from m3ae_fast.data.tokenizer import CaptionTokenizer, load_tokenizer

__all__ = [
    "BadSamples",
    "CaptionTokenizer",
    "Corpus",
    "ShardStore",
    "Skipped",
    "build_loader",
    "load_tokenizer",
    "open_corpus",
]
