"""Former names of commands and their present names. This module imports nothing that takes a long time to load."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# present name of each renamed command; the former name includes an argument if the present name depends on it
RENAMED = {
    "transfer": "evaluate",
    "features": "embed",
    "fill": "draw fill",
    "visualise": "draw reconstructions",
    "visualise attention": "draw attention",
    "visualise map": "draw map",
    "data": "shards",
    "data from-folder": "shards make",
    "data from-hdf5": "shards make",
    "data from-hf": "shards make",
    "data index": "shards index",
    "data stats": "shards stats",
    "data manifest": "shards manifest",
    "data train-tokenizer": "shards tokenizer",
}
# further modules that could formerly be started as `python -m m3ae_fast.NAME`
_MODULES = ("convert", "export", "report", "status", "verify", "config", "pretrain")


def present_name(words: Sequence[str], typed: str = "m3ae-fast ") -> str | None:
    """Return a message with the present name of the command in `words`; None if it was not renamed. `typed`: the part
    of the command line before `words`, for the message.
    """
    if not words or words[0] not in RENAMED:
        return None
    names = [f"{words[0]} {word}" for word in words[1:]]
    former = next((name for name in names if name in RENAMED), words[0])
    return f"{typed}{former} has been renamed to m3ae-fast {RENAMED[former]}"


def present_module(arguments: Sequence[str]) -> str | None:
    """Return a message with the present command if `python` with these arguments would start a former module; None
    otherwise.
    """
    if "-m" not in arguments[:-1]:
        return None
    _, module, *words = arguments[arguments.index("-m") :]
    package, _, name = module.partition(".")
    if package != "m3ae_fast":
        return None
    if name in _MODULES:
        return f"python -m {module} has been renamed to m3ae-fast {name}"
    return present_name([name, *words], "python -m m3ae_fast.")


def refuse_former_module() -> None:
    """Exit with the message of `present_module` and code 2, if there is such a message."""
    if line := present_module(sys.orig_argv[1:]):
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
