"""The exit of a program: its last line and its exit code."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3ae_fast.base.errors import ErrorElsewhere, UserError, attempt, error_report, exit_cleanly, raise_shared


def test_an_error_is_one_line_even_if_a_name_in_it_contains_line_breaks(capsys):
    def main():
        raise UserError("a\n  b.jpg: is damaged \x1b[2J\udcff\n")

    assert exit_cleanly(main) == 2
    assert (
        capsys.readouterr().err == "error: a b.jpg: is damaged \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"
    )


@pytest.mark.parametrize("command", [["m3ae_fast"], ["m3ae_fast", "--version"]])
def test_output_that_cannot_be_written_is_reported_in_one_line(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", "-m", *command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"


@pytest.fixture
def ended(monkeypatch, capsys):
    """Return a function that returns the last line of a program that raises an error, or None if the error was raised
    unchanged."""

    def ended(error, *words):
        def main():
            raise error

        monkeypatch.setattr(sys, "argv", ["program", *words])
        try:
            assert exit_cleanly(main) == 2
        except type(error) as raised:
            assert raised is error
            return None
        return capsys.readouterr().err

    return ended


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "EIO", "EMFILE", "EPIPE", "ECONNREFUSED"])
def test_an_os_error_is_reported_in_one_line(ended, name):
    error = OSError(getattr(errno, name), "refused", "/some/file")
    assert ended(error) == f"error: {error}\n"


@pytest.mark.parametrize("name", ["ENOENT", "EISDIR", "EEXIST", "ENOTDIR"])
def test_an_error_of_a_file_named_on_the_command_line_is_reported_in_one_line(ended, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = OSError(getattr(errno, name), "not so", str(tmp_path / "a.json"))
    for words in ([str(tmp_path / "a.json")], ["--config", "a.json"], ["--set", "run.dir=./a.json"], ["--out=a.json"]):
        assert ended(error, *words) == f"error: {error}\n"
    assert ended(error, "b.json", "--set", "") is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/file/of/the/program"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", 3),
        OSError("no number"),
        KeyError("a"),
    ],
    ids=repr,
)
def test_an_error_that_is_a_bug_keeps_its_traceback(ended, error):
    assert ended(error, "a.json") is None


def _shared(*errors):
    """Call `raise_shared` once for each of several processes, and return the exceptions that it raises; None if it
    raises none. `errors`: the error of each process, or None."""
    found = []
    for own in errors:
        try:
            raise_shared(own, [error_report(error, f"rank {rank}") for rank, error in enumerate(errors)])
            found.append(None)
        except Exception as error:
            found.append(error)
    return found


def test_an_error_of_one_process_ends_all_processes():
    assert _shared(None, None) == [None, None]
    for error in (UserError("a.tar: damaged"), OSError(errno.ENOSPC, "No space left"), MemoryError("no room")):
        first, second = _shared(None, error)
        assert type(first) is type(second) is UserError and str(first) == str(second)
        assert str(error) in str(first)


def test_a_bug_is_raised_on_its_process_and_named_on_the_others():
    bug = KeyError("a")
    first, second, third = _shared(None, bug, None)
    assert second is bug
    for other in (first, third):
        assert (
            type(other) is ErrorElsewhere
            and str(other) == "rank 1 has failed (KeyError: 'a'); see its output for details"
        )


def test_a_user_error_is_reported_even_if_another_process_has_a_bug():
    bug = KeyError("a")
    first, second, third = _shared(bug, UserError("mine"), None)
    assert first is bug and type(second) is type(third) is UserError and {str(second), str(third)} == {"mine"}


def test_a_panic_is_handled_as_an_error_and_a_stop_is_not():
    class Panic(BaseException):
        pass

    for kind, caught in ((Panic, True), (KeyboardInterrupt, False), (SystemExit, False)):

        def work(kind=kind):
            raise kind

        if caught:
            assert isinstance(attempt(work)[1], kind)
        else:
            with pytest.raises(kind):
                attempt(work)


def test_every_program_ends_with_its_exit_code():
    """`exit_cleanly` returns the exit code. If a program did not pass it on, it would exit with 0 after an error."""
    root = Path(__file__).parents[1]
    folders = ("m3ae_fast", "lab", "benchmarks", "examples")
    programs = [path for folder in folders for path in (root / folder).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in programs}
    assert any("sys.exit(exit_cleanly(main))" in text for text in texts.values())
    assert not [path for path, text in texts.items() if re.search(r"^ +exit_cleanly\(", text, re.M)]
