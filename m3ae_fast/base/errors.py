"""UserError, the exception for a user's mistake, and errors that are shared between processes."""

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
    """A mistake in the config, data, checkpoint or command line. The message is one line that states what is wrong and
    what to do.

    Programs of this package print the message without a traceback and exit with `exit_code`.

    It is not a ValueError, because parsers raise ValueError for damaged files: code that catches these errors and
    replaces their message would then also replace the message of a UserError.
    """

    exit_code = 2


class ErrorElsewhere(UserError):
    """An error that another process reports: a mistake of the user, or a bug. The other process prints the message or
    the traceback. Programs of this package exit with `exit_code` and print nothing."""


class RankLost(UserError):
    """The loss of another rank, for example because its node has failed. This is not a mistake of the user, so a
    restart loop should restart the run."""

    exit_code = TRY_AGAIN


class ErrorReport(NamedTuple):
    """Summary of a process's error that is sent to the other processes."""

    line: str
    # whether `line` explains the error; if not, the error is a bug, and the process that raised it prints the traceback
    complete: bool


# system errors that are not bugs of the program
_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_LIMITS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}
_DEVICES = {errno.EIO, errno.ESTALE, errno.EPIPE}
_NETWORK = {errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH}
_REFUSALS = _RIGHTS | _LIMITS | _DEVICES | _NETWORK

_in_program = False  # whether `exit_cleanly` is running a program's main


def one_line(error: BaseException) -> str | None:
    """Return a one-line message for an error that the user can act on: a UserError, insufficient memory, an operation
    that the system refuses, or a missing file that is named on the command line. Return None for any other error, which
    is a bug and needs its traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return no_memory(error)
    if isinstance(error, OSError) and (error.errno in _REFUSALS or _named_by_user(error.filename)):
        return str(error)
    return None


def _named_by_user(file: object) -> bool:
    """Return whether the command line names this file, as an argument or as the value in an argument such as --set
    NAME=VALUE."""
    if not isinstance(file, str | bytes | os.PathLike):
        return False
    words = (part for word in sys.argv[1:] for part in (word, word.rpartition("=")[2]))
    return os.path.abspath(os.fsdecode(file)) in {os.path.abspath(word) for word in words if word}


def attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return the result of `work` and None, or None and the error that it raises. KeyboardInterrupt and SystemExit are
    not caught."""
    try:
        return work(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the error raised by a panic in a Rust library is not an Exception
        return None, error


def error_report(error: BaseException | None, who: str) -> ErrorReport | None:
    """Return the summary of an error of process `who` for the other processes; None if there is no error."""
    if error is None:
        return None
    if (line := one_line(error)) is not None:
        return ErrorReport(line, True)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return ErrorReport(f"{who} has failed ({type(error).__name__}: {reason}); see its output for details", False)


def raise_shared(own: BaseException | None, reports: Iterable[Sequence[Any] | None]) -> None:
    """Raise an error in every process if any process reports one; otherwise return.

    Raises:
        Exception: `own`, the error of this process, if it is a bug.
        UserError: the first error, in the order of the processes, that can be explained in one line.
        ErrorElsewhere: all reported errors are bugs in other processes.
    """
    if own is not None and one_line(own) is None:
        raise own
    # Errors with an explanation come first. Because the sort is stable, they stay in the order of the processes.
    found = sorted((ErrorReport(*each) for each in reports if each), key=lambda each: not each.complete)
    if found:
        raise (UserError if found[0].complete else ErrorElsewhere)(found[0].line)


def _on_one_line(text: str) -> str:
    """Return the message without line breaks and terminal control characters, which file names may contain."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def in_program() -> bool:
    """Return whether this process runs a program of this package, rather than a user's code that calls the package's
    functions. Only a program may exit."""
    return _in_program


def exit_cleanly(main: Callable[[], int]) -> int:
    """Run a program's main and return its exit code. If `one_line` explains an error, its message is printed on stderr,
    unless another process prints it; the exit code is then 2, or the `exit_code` of the UserError. After Ctrl-C, the
    exit code is 130. Any other error is raised."""
    global _in_program
    before, _in_program = _in_program, True
    try:
        return main()
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        if not isinstance(error, ErrorElsewhere):
            # one write, so that the lines of several ranks are not mixed
            print(f"error: {_on_one_line(line)}\n", end="", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else UserError.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        _in_program = before
