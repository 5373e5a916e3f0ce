"""What command lines share."""

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.command_line import output, seed

WRONG = [
    (output(), "", "is empty; name one"),  # as of a variable of the shell that is not set
    (output(), "out\udcff", "is not UTF-8"),
    (output(".png"), "photo.jpg", "photo.jpg: must end in .png"),
    (output(".npz", ".parquet"), "npz", "npz: must end in .npz or .parquet"),
    (seed, "-1", "-1: must be a whole number from 0"),
    (seed, "9" * 40, "9: must be a whole number from 0"),
    (seed, "", "must be a whole number from 0"),
]


@pytest.mark.parametrize("parse, text, message", WRONG)
def test_what_cannot_be_is_refused(parse, text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_what_can_be_is_parsed():
    assert str(output()("a/b")) == "a/b" and output(".png")("b.png").name == "b.png"
    assert seed(str((1 << 63) - 1)) == (1 << 63) - 1
