"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from m3ae_fast.memory import no_memory, out_of_memory

T = TypeVar("T")


class UserError(Exception):
    """A mistake in config, data, checkpoint or command line: one line that names the thing and what to do.

    Programs of this package print it without a traceback and exit with code 2.
    """


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what `work` gives, and the text of a UserError or OSError that it raises instead; else None."""
    try:
        return work(), None
    except (UserError, OSError) as error:
        return None, str(error)


def library(name: str, wanted: str) -> Any:
    """Import and return a library that not every installation has. Raises UserError, `wanted`, where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(wanted) from None


def _on_one_line(text: str) -> str:
    """Return a message without what names in it may hold: line ends, and what a terminal would obey."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def exit_cleanly(main: Callable[[], int]) -> int:
    """Run a program's main; a UserError, a lack of memory, or what the system refuses (a full disk), becomes one line
    on stderr and exit code 2, Ctrl-C code 130."""
    try:
        return main()
    except Exception as error:
        if not isinstance(error, UserError) and out_of_memory(error):
            error = UserError(no_memory(error))
        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"error: {_on_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
