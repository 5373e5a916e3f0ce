"""From shards on disk or elsewhere to packed batches."""

from m3ae_fast.data.corpus import Corpus, open_corpus
from m3ae_fast.data.dataset import Preparation
from m3ae_fast.data.fetcher import Node
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.lanes import Layout, lay_out
from m3ae_fast.data.loader import Share, eval_loader, eval_samples, samples_of, train_loader
from m3ae_fast.data.opening import Data, open_data, open_image_tokenizer, open_tokenizer
from m3ae_fast.data.shards import ShardStore

__all__ = [
    "Corpus",
    "Data",
    "Layout",
    "Node",
    "Preparation",
    "ShardStore",
    "Share",
    "eval_loader",
    "eval_samples",
    "fingerprint",
    "lay_out",
    "open_corpus",
    "open_data",
    "open_image_tokenizer",
    "open_tokenizer",
    "samples_of",
    "train_loader",
]
