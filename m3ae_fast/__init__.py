"""Pre-training of multimodal masked autoencoders (M3AE, arXiv 2205.14204) and their relatives, fast."""

import os
import sys
from typing import Any

from m3ae_fast.base.environment import settle_home, settle_libraries
from m3ae_fast.base.memory import refuse_too_few_addresses, shown_in_one_line

__all__ = ["__version__", "pretrain"]

_folder = os.path.dirname(os.path.realpath(__file__))
if sys.argv[:1] == ["-m"] or os.path.dirname(os.path.realpath(sys.argv[0])) == _folder:
    sys.excepthook = shown_in_one_line  # a command of this package is being started
    refuse_too_few_addresses()
    settle_libraries()
settle_home()  # before other libraries look for it


def __getattr__(name: str) -> Any:
    """Return what is imported only when it is asked for: it imports torch, which takes seconds."""
    if name == "__version__":
        from m3ae_kernels.version import __version__

        return __version__
    if name == "pretrain":
        settle_libraries()
        from m3ae_fast.pretraining.program import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
