"""Descriptions of settings for the help of commands and the pages of settings: defaults, allowed values, meanings."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from m3ae_fast.config.evaluation import Uses, section_class

_INDENT = " " * 6
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def settings_help(uses: Uses) -> str:
    """Return the settings that a task uses as lines for --help: default, allowed values and meaning."""
    lines = ["settings, which are passed with --set KEY=VALUE (for the settings of data and run, see docs/config.md):"]
    for name in uses.sections:
        section = section_class(name)
        schemas = section.model_json_schema()["properties"]
        for key in uses.keys(name):
            field = section.model_fields[key]
            default = uses.default(f"{name}.{key}") or uses.default(name) or default_value(section, key, field)
            meaning = " ".join((field.description or "").split())
            text = f"{meaning} Default: {default}; allowed: {allowed_values(schemas[key], 'a section')}."
            lines += [
                "",
                f"  {name}.{key}",
                *wrap(text.replace("`", ""), 100, initial_indent=_INDENT, subsequent_indent=_INDENT),
            ]
    return "\n".join(lines)


def allowed_values(schema: dict[str, Any], section: str) -> str:
    """Return the values that a field's JSON schema allows. `section`: text that stands for a section, if the field may
    be one."""
    if "anyOf" in schema:
        return " or ".join(allowed_values(one, section) for one in schema["anyOf"])
    if "$ref" in schema:
        return section
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        if "items" in schema:
            return f"list: {allowed_values(schema['items'], section)}"
        first, *_ = items = schema["prefixItems"]  # all items have the same schema
        return f"list of {len(items)}: {allowed_values(first, section)}"
    if kind in ("integer", "number"):
        bounds = [f"{sign} {_number(schema[name])}" for name, sign in _BOUNDS.items() if name in schema]
        return " ".join(filter(None, [kind, ", ".join(bounds)]))
    if kind == "boolean":
        return "`true`, `false`"
    return "`null`" if kind == "null" else schema.get("format", kind)


def _number(bound: float) -> str:
    """Return a bound in readable form: powers of two above 65,536 are written as powers."""
    if isinstance(bound, int) and bound > 1 << 16 and bound & (bound - 1) == 0:
        return f"2^{bound.bit_length() - 1}"
    return f"{bound:,.15g}"


def default_value(section: type[BaseModel], key: str, field: FieldInfo) -> str:
    """Return the default of a setting as text."""
    if field.is_required():
        return "from `size`" if section.__name__ == "ModelConfig" else "required"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"see {key}"
    return f"`{json.dumps(value, default=str)}`"
