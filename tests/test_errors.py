"""How a program ends."""

import subprocess
import sys

import pytest

from m3ae_fast.errors import UserError, exit_cleanly


def test_an_error_is_one_line_whatever_a_name_in_it_holds(capsys):
    def main():
        raise UserError("a\n  b.jpg: is damaged \x1b[2J\udcff\n")

    assert exit_cleanly(main) == 2
    assert (
        capsys.readouterr().err == "error: a b.jpg: is damaged \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"
    )


@pytest.mark.parametrize("command", [["m3ae_fast"], ["m3ae_fast", "config"], ["m3ae_fast.config"]])
def test_a_page_that_cannot_be_written_is_a_line(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", "-m", *command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"
