"""pydantic's errors -> one line that names the field and, for a misspelt one, the nearest known."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_ALIKE = 0.75  # of difflib's ratio, at which a misspelt key is taken for a known one of its section


def describe_error(section: type[BaseModel], error: ValidationError) -> str:
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = _unknown(section, first["loc"], where, first["input"])
    elif first["type"] == "missing":
        text = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        got = "" if isinstance(first["input"], dict) else f" (got {json.dumps(first['input'], default=str)[:80]})"
        text = message if not where or message.startswith(f"{where}.") else f"{where}: {message}{got}"
    text = " ".join(text.split())[:1000]  # a key may be anything
    return text + (f" (and {len(others)} more)" if others else "")


def _unknown(section: type[BaseModel], loc: tuple[int | str, ...], where: str, value: Any) -> str:
    """Return a sentence on an unknown key, with the likeliest known one: of a similar name in the same section, or of
    the same name in another."""
    known, last = list(_section_at(section, loc[:-1]).model_fields), str(loc[-1])
    inside = "".join(f"{part}." for part in loc[:-1])
    near = [inside + name for name in difflib.get_close_matches(last, known, n=1, cutoff=_ALIKE)]
    if not near:
        name = where
        while isinstance(value, dict) and value:  # of an unknown section: the setting in it
            last, value = next(iter(value.items()))
            name += f".{last}"
        if near := settings_called(section, last):
            where = name
    near = near or [inside + name for name in difflib.get_close_matches(last, known, n=1, cutoff=0.0)]
    return f"unknown key {where}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def settings_called(root: type[BaseModel], key: str) -> list[str]:
    """Return the settings `section.key` of the sections of `root` that have one of that name."""
    sections = ((name, section_of(field.annotation)) for name, field in root.model_fields.items())
    return [f"{name}.{key}" for name, section in sections if section and key in section.model_fields]


def _section_at(section: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the section that `loc` points to."""
    for part in loc:
        if isinstance(part, str):
            section = section_of(section.model_fields[part].annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field's annotation names: by itself, in a list, or as an optional."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
