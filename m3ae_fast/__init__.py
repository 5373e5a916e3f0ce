"""Fast pre-training of multimodal masked autoencoders (M3AE, arXiv 2205.14204) and related models."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from m3ae_fast.base.environment import configure_home, configure_libraries
from m3ae_fast.base.memory import refuse_too_few_addresses, shown_in_one_line

if TYPE_CHECKING:
    from m3ae_fast import shards as shards
    from m3ae_fast.base.errors import UserError
    from m3ae_fast.embedding.features import embed
    from m3ae_fast.embedding.nearest_images import neighbours
    from m3ae_fast.evaluation.task_runner import evaluate
    from m3ae_fast.model.m3ae import M3AE
    from m3ae_fast.pretraining.stages import pretrain
    from m3ae_fast.train import train
    from m3ae_fast.weights.converting import convert
    from m3ae_fast.weights.open_model import load_model

__all__ = [
    "M3AE",
    "UserError",
    "__version__",
    "convert",
    "embed",
    "evaluate",
    "load_model",
    "neighbours",
    "pretrain",
    "train",
]

_MODULES = {
    "M3AE": "m3ae_fast.model.m3ae",
    "UserError": "m3ae_fast.base.errors",
    "convert": "m3ae_fast.weights.converting",
    "embed": "m3ae_fast.embedding.features",
    "evaluate": "m3ae_fast.evaluation.task_runner",
    "load_model": "m3ae_fast.weights.open_model",
    "neighbours": "m3ae_fast.embedding.nearest_images",
    "pretrain": "m3ae_fast.pretraining.stages",
}

_folder = os.path.dirname(os.path.realpath(__file__))
if sys.argv[:1] == ["-m"] or os.path.dirname(os.path.realpath(sys.argv[0])) == _folder:
    sys.excepthook = shown_in_one_line  # a command of this package is being started
    refuse_too_few_addresses()
    configure_libraries()
configure_home()  # before other libraries look for the home folder


def __getattr__(name: str) -> Any:
    """Import an attribute on first access, because importing torch takes seconds."""
    if name == "__version__":
        from m3ae_kernels.version import __version__

        return __version__
    if name == "shards":
        return import_module("m3ae_fast.shards")
    if name == "train":  # a module that can be called
        configure_libraries()
        return import_module("m3ae_fast.train")
    if name in _MODULES:
        configure_libraries()
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
