"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from m3ae_fast.base.memory import no_memory, out_of_memory

T = TypeVar("T")
TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A mistake in config, data, checkpoint or command line: one line that names the thing and what to do.

    Programs of this package print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2


class ErrorElsewhere(UserError):
    """A bug that another process met, which shows its traceback itself."""


class RankLost(UserError):
    """Another rank has ended, perhaps killed or with its node. Nothing is wrong with what the user asked for, so a loop
    that restarts the run should go on."""

    exit_code = TRY_AGAIN


class Told(NamedTuple):
    """What other processes learn about an error of one of them."""

    line: str
    complete: bool  # the line says everything; of a bug the process itself shows the traceback


# what the system refuses whatever a program does
_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_LIMITS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}
_DEVICES = {errno.EIO, errno.ESTALE, errno.EPIPE}
_NETWORK = {errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH}
_REFUSALS = _RIGHTS | _LIMITS | _DEVICES | _NETWORK


def one_line(error: BaseException) -> str | None:
    """Return the line that says all about a UserError, a lack of memory, what the system refuses, or a file that the
    command line names; None for any other error: a bug, of which the traceback matters."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return no_memory(error)
    if isinstance(error, OSError) and (error.errno in _REFUSALS or _named_by_user(error.filename)):
        return str(error)
    return None


def _named_by_user(file: object) -> bool:
    """Return whether a word of the command line, or the value in a word such as --set NAME=VALUE, is this file."""
    if not isinstance(file, str | bytes | os.PathLike):
        return False
    words = (part for word in sys.argv[1:] for part in (word, word.rpartition("=")[2]))
    return os.path.abspath(os.fsdecode(file)) in {os.path.abspath(word) for word in words if word}


def attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return the result of `work` and None, or None and the error that it raises."""
    try:
        return work(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return None, error


def told(error: BaseException | None, who: str) -> Told | None:
    """Return what processes other than `who` learn about its error; None if there is none."""
    if error is None:
        return None
    if (line := one_line(error)) is not None:
        return Told(line, True)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return Told(f"{who} has failed ({type(error).__name__}: {reason}); its output says why", False)


def raise_shared(own: BaseException | None, all_told: Iterable[Sequence[Any] | None]) -> None:
    """Raise, in each of several processes, an error that any of them has met; return if there is none.

    Raises:
        Exception: `own`, this process's error, if it is a bug.
        UserError: the first error of all processes that a line explains.
        ErrorElsewhere: there are only bugs of others.
    """
    if own is not None and one_line(own) is None:
        raise own
    found = sorted((Told(*each) for each in all_told if each), key=lambda each: not each.complete)  # which is stable
    if found:
        raise (UserError if found[0].complete else ErrorElsewhere)(found[0].line)


def _on_one_line(text: str) -> str:
    """Return the message on one line, without line breaks and terminal control characters that file names may
    contain."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def exit_cleanly(main: Callable[[], int]) -> int:
    """Run a program's main. An error that `one_line` explains becomes that line on stderr and exit code 2, or
    the code of the UserError; Ctrl-C becomes code 130; any other error is raised."""
    try:
        return main()
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        print(f"error: {_on_one_line(line)}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else UserError.exit_code
    except KeyboardInterrupt:
        return 130
