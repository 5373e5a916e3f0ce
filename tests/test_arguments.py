"""Arguments that are declared once, as fields of a class, for the command line and for Python."""

import argparse
import inspect
from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
from pydantic import Field

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.arguments import Arguments, CommaList, Option, Settings, Shards, accepts, add_arguments

Fruit = Literal["apple", "pear"]


class Basket(Arguments):
    """Fill a basket."""

    owner: Annotated[str, Option("owner", metavar="OWNER")]
    """name of the owner"""
    own_shards: Shards
    """samples"""
    fruit: Annotated[Sequence[Fruit], CommaList, Option(metavar="NAME,NAME")] = ()
    """kinds of `fruit` (default: none)"""
    colour: Literal["red", "green"] | None = None
    """colour of the basket"""
    size: Annotated[int, Field(ge=1)] = 3
    """number of places"""
    lid: bool = True
    """close the basket"""
    gift: Annotated[bool, Option(group="wrapping")] = False
    """wrap it"""
    overrides: Settings = ()
    """a setting"""


@pytest.fixture
def parse():
    """Return a function that parses a line to a Basket."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, Basket)
    return lambda line: Basket.of_command(vars(parser.parse_args(line.split())))


def test_a_line_and_python_arguments_give_the_same_object(parse):
    line = "me --own-shards a.tar b.tar --fruit pear,apple,pear --colour red --size 5 --no-lid --gift --set a.b=1"
    python = Basket(
        owner="me", own_shards=["a.tar", "b.tar"], fruit=["pear", "apple"], colour="red", size=5, lid=False, gift=True,
        overrides={"a.b": 1},
    )  # fmt: skip
    assert parse(line) == python
    assert parse("me --own-shards a.tar") == Basket(owner="me", own_shards="a.tar")
    assert Basket(owner="me", own_shards="a.tar", fruit="pear").fruit == ["pear"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size 0", "--size 0: must be greater than or equal to 1"),
        ("--size x", "--size x: must be a valid integer, unable to parse string as an integer"),
        ("--fruit plum,pear", "--fruit plum: must be apple or pear"),
        ("--fruit=", "--fruit '': must be apple or pear"),
    ],
)
def test_a_message_calls_an_argument_by_its_name_in_the_command_or_in_python(parse, line, message):
    with pytest.raises(UserError) as error:
        parse(f"me --own-shards a.tar {line}")
    assert str(error.value) == message
    name, _, value = line.removeprefix("--").replace("=", " ").partition(" ")
    with pytest.raises(UserError) as error:
        Basket(owner="me", own_shards="a.tar", **{name: value})
    assert str(error.value) == message.removeprefix("--")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"own_shards": "a.tar"}, "owner: is missing"),
        ({"owner": "me", "own_shards": []}, "own_shards: is empty"),
        ({"owner": "me", "own_shards": ["a", 5]}, r"own_shards \['a', 5\]: must be a name or a path, not int"),
        (
            {"owner": "me", "own_shards": "a", "colours": "red"},
            "colours: there is no such argument; did you mean colour",
        ),
    ],
)
def test_a_mistake_in_python_is_reported_in_one_line(given, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        Basket(**given)
    assert "\n" not in str(error.value)


def test_the_help_consists_of_the_strings_below_the_fields():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Basket)
    shown = " ".join(parser.format_help().split())
    for text in (
        "OWNER name of the owner",
        "--own-shards SHARDS [SHARDS ...] samples",
        "--fruit NAME,NAME kinds of fruit (from apple, pear; default: none)",
        "--colour {red,green} colour of the basket",
        "--size N number of places (default: 3)",
        "--no-lid do not close the basket",
        "--set KEY=VALUE a setting",
        "wrapping: --gift wrap it",
    ):
        assert text in shown


def test_the_fields_are_shown_as_the_arguments_of_a_function():
    @accepts(Basket)
    def fill(owner: str, **options):
        return Basket(owner=owner, **options)

    shown = inspect.signature(fill).parameters
    assert [*shown] == [*Basket.model_fields]
    assert (shown["own_shards"].default, shown["size"].default) == (inspect.Parameter.empty, 3)
    assert shown["owner"].annotation is str and shown["lid"].kind is inspect.Parameter.KEYWORD_ONLY
    assert fill("me", own_shards="a.tar", size=4).size == 4
