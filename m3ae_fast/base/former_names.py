"""Names that commands had before, and what they are called now. Imports nothing that takes time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# what could be started as `python -m m3ae_fast.NAME`: the command of the same name, or of another one
RENAMED = {"transfer": "evaluate", "features": "embed"}
_MODULES = ("data", "convert", "export", "fill", "visualise", "report", "status", "verify", "config", "pretrain")


def present_name(name: str) -> str | None:
    """Return the line that says how a command is called now; None if it has no other name."""
    return f"m3ae-fast {name} is called m3ae-fast {RENAMED[name]} now" if name in RENAMED else None


def present_module(arguments: Sequence[str]) -> str | None:
    """Return the line that says how a program is started now, if these arguments of Python start it as a module that
    is gone; None otherwise."""
    if "-m" not in arguments[:-1]:
        return None
    module = arguments[arguments.index("-m") + 1]
    package, _, name = module.partition(".")
    if package != "m3ae_fast" or name not in (*RENAMED, *_MODULES):
        return None
    return f"python -m {module} is called m3ae-fast {RENAMED.get(name, name)} now"


def refuse_former_module() -> None:
    """Exit with the line of `present_module`, if there is one, and code 2."""
    if line := present_module(sys.orig_argv[1:]):
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
