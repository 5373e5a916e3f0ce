"""From shards on disk or elsewhere to packed batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3ae_fast.data.corpus import Corpus as Corpus
    from m3ae_fast.data.corpus import open_corpus as open_corpus
    from m3ae_fast.data.dataset import Preparation as Preparation
    from m3ae_fast.data.fetcher import Node as Node
    from m3ae_fast.data.lanes import Layout as Layout
    from m3ae_fast.data.lanes import lay_out as lay_out
    from m3ae_fast.data.loader import Share as Share
    from m3ae_fast.data.loader import eval_loader as eval_loader
    from m3ae_fast.data.loader import eval_samples as eval_samples
    from m3ae_fast.data.loader import samples_of as samples_of
    from m3ae_fast.data.loader import train_loader as train_loader
    from m3ae_fast.data.opening import Data as Data
    from m3ae_fast.data.opening import open_data as open_data
    from m3ae_fast.data.opening import open_image_tokenizer as open_image_tokenizer
    from m3ae_fast.data.opening import open_tokenizer as open_tokenizer
    from m3ae_fast.data.shards import ShardStore as ShardStore

_NAMES = {
    "corpus": ("Corpus", "open_corpus"),
    "dataset": ("Preparation",),
    "fetcher": ("Node",),
    "lanes": ("Layout", "lay_out"),
    "loader": ("Share", "eval_loader", "eval_samples", "samples_of", "train_loader"),
    "opening": ("Data", "open_data", "open_image_tokenizer", "open_tokenizer"),
    "shards": ("ShardStore",),
}


def __getattr__(name: str) -> Any:
    """Return what is imported only when it is asked for: the parsers of `python -m m3ae_fast.data` need no torch."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
