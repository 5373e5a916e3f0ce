"""Creation, indexing and statistics of shards, and training of tokenizers. Each command of `m3ae-fast shards` is a
function of this package, such as `m3ae_fast.shards.make(...)`.

Sources of all kinds are read as `sources.interface.Records`, which `writer.convert` writes as shards.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3ae_fast.shards.making import make
    from m3ae_fast.shards.shard_table import table
    from m3ae_fast.shards.statistics import stats
    from m3ae_fast.shards.tokenizer_training import tokenizer

__all__ = ["make", "stats", "table", "tokenizer"]

_MODULES = {
    "make": "making",
    "stats": "statistics",
    "table": "shard_table",
    "tokenizer": "tokenizer_training",
}


def __getattr__(name: str) -> Any:
    """Import an attribute on first access, because the argument parsers of `m3ae-fast shards` must not import torch."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
