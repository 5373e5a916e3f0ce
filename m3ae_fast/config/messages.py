"""Conversion of pydantic's errors to one line that names the field and, if it is misspelt, the most similar field."""

from __future__ import annotations

import difflib
import json
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from m3ae_fast.base.wording import counted

UNIONS = (Union, UnionType)
_ALIKE = 0.75  # minimum similarity (difflib's ratio) between an unknown key and a key that is suggested instead


def describe_error(section: type[BaseModel], error: ValidationError) -> str:
    """Return a line that describes the first error and states the number of further errors."""
    first, *others = error.errors()
    loc = first["loc"] if first["type"] == "extra_forbidden" else _without_kinds(section, first["loc"])
    where = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        text = _unknown(section, first["loc"], where, first["input"])
    elif first["type"] == "missing":
        text = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if len(loc) < len(first["loc"]):  # pydantic reports one error for each allowed type of the setting
            alike = [each for each in others if _without_kinds(section, each["loc"])[: len(loc)] == loc]
            others = [each for each in others if each not in alike]
            kinds = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in alike)
            message = " or ".join([message, *(kind for kind in kinds if not message.endswith(kind))])
        got = "" if isinstance(first["input"], dict) else f" (got {json.dumps(first['input'], default=str)[:80]})"
        text = message if not where or message.startswith(f"{where}.") else f"{where}: {message}{got}"
    text = " ".join(text.split())[:1000]  # an unknown key may have any length, and contain line breaks
    return text + (f" (and {counted(len(others), 'more error')})" if others else "")


def _without_kinds(section: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the location of an error without pydantic's names for the kinds of values that a setting can have, such as
    `constrained-float`."""
    kept: list[int | str] = []
    several = False
    for part in loc:
        if isinstance(part, str) and (field := section.model_fields.get(part)):
            section = section_of(field.annotation) or section
            several = len({*get_args(field.annotation)} - {type(None)}) > 1 and get_origin(field.annotation) in UNIONS
        elif isinstance(part, str) and several:
            continue
        kept.append(part)
    return tuple(kept)


def _unknown(section: type[BaseModel], loc: tuple[int | str, ...], where: str, value: Any) -> str:
    """Return a message about an unknown key, with the most likely alternative: a key of the same section with a similar
    name, or a key of another section with the same name."""
    known, last = list(_section_at(section, loc[:-1]).model_fields), str(loc[-1])
    inside = "".join(f"{part}." for part in loc[:-1])
    near = [inside + name for name in difflib.get_close_matches(last, known, n=1, cutoff=_ALIKE)]
    if not near:
        name = where
        while isinstance(value, dict) and value:  # the unknown key is a section: use its first setting
            last, value = next(iter(value.items()))
            name += f".{last}"
        if near := settings_called(section, last):
            where = name
    near = near or [inside + name for name in difflib.get_close_matches(last, known, n=1, cutoff=0.0)]
    return f"unknown key {where}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def settings_called(root: type[BaseModel], key: str) -> list[str]:
    """Return the settings called `key` in all sections of `root`, as `section.key`."""
    sections = ((name, section_of(field.annotation)) for name, field in root.model_fields.items())
    return [f"{name}.{key}" for name, section in sections if section and key in section.model_fields]


def _section_at(section: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the class of the section at the location `loc` of an error."""
    for part in loc:
        if isinstance(part, str):
            section = section_of(section.model_fields[part].annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in the annotation of a field that is a section, a list of sections or an optional
    section; None for other fields."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
