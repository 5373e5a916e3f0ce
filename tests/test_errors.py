"""How a program ends."""

from m3ae_fast.errors import UserError, exit_cleanly


def test_an_error_is_one_line_whatever_a_name_in_it_holds(capsys):
    def main():
        raise UserError("a\n  b.jpg: is damaged \x1b[2J\udcff\n")

    assert exit_cleanly(main) == 2
    assert (
        capsys.readouterr().err == "error: a b.jpg: is damaged \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"
    )
