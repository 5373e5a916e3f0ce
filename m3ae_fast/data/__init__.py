"""Data loading, from local or remote shards to packed batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3ae_fast.data.corpus import Corpus, open_corpus
    from m3ae_fast.data.dataset import Preparation
    from m3ae_fast.data.lane_count import Layout, lay_out
    from m3ae_fast.data.loader import eval_loader, eval_samples, samples_of, train_loader
    from m3ae_fast.data.opening import Data, open_data, open_image_tokenizer, open_tokenizer
    from m3ae_fast.data.rank_share import Share, split_batch
    from m3ae_fast.data.shard_store import ShardStore

_NAMES = {
    "corpus": ("Corpus", "open_corpus"),
    "dataset": ("Preparation",),
    "lane_count": ("Layout", "lay_out"),
    "loader": ("eval_loader", "eval_samples", "samples_of", "train_loader"),
    "opening": ("Data", "open_data", "open_image_tokenizer", "open_tokenizer"),
    "rank_share": ("Share", "split_batch"),
    "shard_store": ("ShardStore",),
}


def __getattr__(name: str) -> Any:
    """Import attributes on first access, because the argument parsers of `m3ae-fast shards` must not import torch."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
