"""Arguments of a command, and of the Python function of the same name, declared once as the fields of a class.

`Arguments` checks them, and `add_arguments` adds them to the parser of the command. tyro, pydantic-settings and
jsonargparse were tried and not used: their messages take several lines, their start-up takes up to twice as long, and
the last two do not accept `--train a.tar b.tar`, which is what the shell makes of `--train *.tar`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.config.load import override_list
from m3ae_fast.config.value_range import Range, as_range

A = TypeVar("A", bound="Arguments")
F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 80  # maximum number of characters of a wrong value in a message


class Option:
    """The form of a field on the command line, if it is not the form that follows from the field's type. All arguments
    except `group` are those of `argparse.ArgumentParser.add_argument`. A name without dashes makes a positional
    argument. `group`: title under which `--help all` shows the field; the short help shows only the field's name."""

    def __init__(self, *names: str, group: str = "", **how: Any) -> None:
        self.names, self.group, self.how = names, group, how


class Arguments(BaseModel):
    """Arguments that are checked when an object is created. The string below a field is its help. Raises UserError if
    an argument is missing, unknown or invalid."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True, use_attribute_docstrings=True
    )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise UserError(self._explained(error)) from None

    @classmethod
    def of_command(cls: type[A], given: Mapping[str, Any]) -> A:
        """Return the arguments found by a parser to which `add_arguments` added the fields. Raises UserError if an
        argument is missing or invalid; the message uses its name on the command line, such as --held-out."""
        try:
            return cls(**given)
        except UserError as error:
            name = re.split(r"\W", str(error), maxsplit=1)[0]
            if name not in cls.model_fields:
                raise
            raise UserError(option_of(cls, name) + str(error).removeprefix(name)) from None

    @classmethod
    def _explained(cls, error: ValidationError) -> str:
        """Return one line that describes the first mistake and begins with the name of the argument."""
        first = error.errors()[0]
        name, value = str(first["loc"][0]), " ".join(str(first["input"]).split())[:_SHOWN] or "''"
        if first["type"] == "extra_forbidden":
            return cls.unknown(name)
        if first["type"] == "missing":
            return f"{name}: is missing"
        if first["type"] == "too_short":
            return f"{name}: is empty"
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        message = message.replace("'", "") if first["type"] == "literal_error" else message
        return f"{name} {value}: {message}"

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return a message about an argument that does not exist."""
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f"{name}: there is no such argument" + (f"; did you mean {near[0]}?" if near else "")


def accepts(arguments: type[Arguments]) -> Callable[[F], F]:
    """Return a decorator for a function that passes its keyword arguments `**options` to `arguments`. Because of the
    decorator, `help` and editors show the fields in place of `**options`."""

    def decorate(function: F) -> F:
        whole = inspect.signature(function)
        own = [each for each in whole.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {name: field for name, field in arguments.model_fields.items() if name not in whole.parameters}
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=field.annotation,
            )
            for name, field in fields.items()
        ]
        function.__signature__ = whole.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def add_arguments(parser: argparse.ArgumentParser, arguments: type[Arguments], *, needed: bool = True) -> None:
    """Add the fields of `arguments` to a parser, those without a default first. Only the fields that are given on the
    command line will be in the parser's result. `needed`: whether the parser requires all fields without a default."""
    places: dict[str, argparse._ActionsContainer] = {"": parser}
    for name, field in sorted(arguments.model_fields.items(), key=lambda each: not each[1].is_required()):
        names, how = _written(name, field)
        if names[0].startswith("-"):
            how = {"dest": name, "required": needed and field.is_required()} | how
        if (group := _option(field).group) not in places:
            places[group] = parser.add_argument_group(group)
        places[group].add_argument(*names, **{"default": argparse.SUPPRESS, "help": _help(field)} | how)


def option_of(arguments: type[Arguments], name: str) -> str:
    """Return the name of a field on the command line, such as --held-out for held_out."""
    names, how = _written(name, arguments.model_fields[name])
    return names[0] if names[0].startswith("-") else how["metavar"]


def _written(name: str, field: FieldInfo) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of a field on the command line, and the other arguments of `add_argument`."""
    how: dict[str, Any] = {}
    kind = _without_none(field.annotation)
    if kind is bool:
        how = {"action": "store_false" if field.default else "store_true"}
    elif get_origin(kind) is Literal:
        how = {"choices": get_args(kind)}
    elif kind in (int, float):
        how = {"metavar": "N"}
    own = _option(field)
    prefix = "--no-" if kind is bool and field.default else "--"
    return own.names or (prefix + name.replace("_", "-"),), how | own.how


def _option(field: FieldInfo) -> Option:
    """Return the Option of a field; a field without one has the form that follows from its type."""
    return next((each for each in reversed(field.metadata) if isinstance(each, Option)), Option())


def _without_none(annotation: Any) -> Any:
    """Return the type in a field's annotation, without None and without metadata."""
    kinds = [each for each in get_args(annotation) if each is not type(None)]
    kind = kinds[0] if type(None) in get_args(annotation) and len(kinds) == 1 else annotation
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _help(field: FieldInfo) -> str:
    """Return the help of a field: its description, the names that a list may contain, and its default."""
    text = " ".join((field.description or "").split()).replace("`", "")
    if field.default is True:
        text = f"do not {text}"
    elif isinstance(field.default, str | int | float) and field.default is not False and "default" not in text:
        text += f" (default: {field.default})"
    items = get_args(field.annotation) if get_origin(field.annotation) is Sequence else ()
    if items and get_origin(items[0]) is Literal:
        text = text.replace("(default", f"(from {', '.join(get_args(items[0]))}; default")
    return text


# Types of fields that several commands have.


def _items(value: Any) -> Any:
    """Return the items of a text such as "cls,mean", of a single number, or of a sequence, without duplicates."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
    return list(dict.fromkeys(items))


def names(value: Any) -> Any:
    """Return one or several names or paths as a list of texts. Raises ValueError if an item is neither."""
    items = [value] if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable) else [*value]
    if odd := [each for each in items if not isinstance(each, str | os.PathLike)]:
        raise ValueError(f"must be a name or a path, not {type(odd[0]).__name__}")
    return [os.fspath(each) for each in items]


def output(*endings: str) -> Callable[[str | os.PathLike[str]], Path]:
    """Return a function that checks the path of an output folder, or of an output file with one of these endings. The
    function raises UserError for an invalid path; for other exceptions, argparse would also print the usage."""

    def parse(given: str | os.PathLike[str]) -> Path:
        text = names([given])[0]
        if not text:
            raise UserError("the output path is empty; specify a path")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{text!r}: the name is not UTF-8; choose another name")
        if endings and not text.endswith(endings):
            raise UserError(f"{text}: must end in {' or '.join(endings)}")
        return Path(text)

    return parse


def _layers(value: Any) -> Any:
    if value is None or value == "all":
        return value
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    if not items or not all(str(item).isdecimal() and int(item) for item in items):
        raise ValueError("must be all, or numbers of blocks from 1, such as 1,2")
    return sorted({int(item) for item in items})


def chosen_layers(wanted: Literal["all"] | Sequence[int] | None, depth: int) -> list[int]:
    """Return the numbers of the selected encoder blocks, in ascending order. `wanted`: "all", or numbers from 1; None:
    only the last block. Raises UserError if a block does not exist."""
    if wanted is None:
        return [depth]
    if wanted == "all":
        return list(range(1, depth + 1))
    if beyond := [layer for layer in wanted if layer > depth]:
        raise UserError(f"layers {beyond[0]}: must be all, or numbers from 1 to {depth}, such as 1,{depth}")
    return [*wanted]


CommaList = BeforeValidator(_items)
Layers = Annotated[Literal["all"] | Sequence[int] | None, BeforeValidator(_layers)]
Name = Annotated[str, BeforeValidator(lambda value: names([value])[0])]  # a name, or a path as text
SHARDS = "tar files (paths, brace patterns, globs, URLs or pipe: commands)"
Shards = Annotated[Sequence[str], BeforeValidator(names), Field(min_length=1), Option(nargs="+", metavar="SHARDS")]
Labels = Annotated[str, Option(metavar="cls|json.FIELD")]
Resume = Annotated[str, Option(metavar="auto|no|PATH")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
ValueRange = Annotated[Range | None, BeforeValidator(as_range), Option(metavar="LOW,HIGH|dtype")]
_FURTHER = "seed and device"
Settings = Annotated[
    Sequence[str],
    BeforeValidator(override_list),
    Option("--set", action="append", metavar="KEY=VALUE"),
]


class WithSettings(Arguments):
    """Arguments of a command with settings."""

    overrides: Settings = ()
    """override a setting, such as data.workers=4; in Python: overrides, a list of such texts or a dict such as
    {"data.workers": 4}"""
    seed: Annotated[Seed | None, Option(metavar="N", group=_FURTHER)] = None
    """random seed: short for --set run.seed=N"""
    device: Annotated[Device | None, Option(group=_FURTHER)] = None
    """device to use; with cpu, the GPUs of this machine are ignored (default: cuda if there is a GPU, otherwise cpu)"""

    @model_validator(mode="after")
    def _has_one_seed(self) -> WithSettings:
        if self.seed is not None and any(each.startswith("run.seed=") for each in self.overrides):
            raise UserError(f"seed {self.seed}: the setting run.seed is given too; leave out one of the two")
        return self

    @property
    def all_overrides(self) -> list[str]:
        """Return the overrides of settings, including that of the seed."""
        return [*self.overrides, *([] if self.seed is None else [f"run.seed={self.seed}"])]
