"""pydantic's errors -> one line that names the field and, for a misspelt one, the nearest known."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def describe_error(section: type[BaseModel], error: ValidationError) -> str:
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_section_at(section, first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        text = f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "missing":
        text = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        got = "" if isinstance(first["input"], dict) else f" (got {json.dumps(first['input'], default=str)[:80]})"
        text = message if not where or message.startswith(f"{where}.") else f"{where}: {message}{got}"
    text = " ".join(text.split())[:1000]  # a key may be anything
    return text + (f" (and {len(others)} more)" if others else "")


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
