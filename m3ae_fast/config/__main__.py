"""python -m m3ae_fast.config: every setting of a run as a Markdown page (docs/config.md)."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from m3ae_fast.config.messages import section_of
from m3ae_fast.config.schema import Config, Section

HEAD = """# Settings

All settings of a run, in the sections of its JSON file; `--set section.key=value` overrides any. Made from
m3ae_fast/config/schema.py by `python -m m3ae_fast.config > docs/config.md`.
"""


def page() -> str:
    """The page, with one table per section."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None
        parts.append(_table(name, section, field.description))
    return "\n".join(parts)


def _table(name: str, section: type[BaseModel], note: str | None = None) -> str:
    # a section without a docstring of its own would show its base's
    about = " ".join(filter(None, (section.__doc__ if section is not Section else "", note)))
    lines = [f"## {name}", "", about, "", "| key | default | meaning |", "|---|---|---|"]
    nested: list[tuple[str, type[BaseModel]]] = []
    for key, field in section.model_fields.items():
        lines.append(f"| `{key}` | {_default(section, key, field)} | {field.description} |")
        inner = section_of(field.annotation)
        if inner is not None and inner.__name__ not in {kind.__name__ for _, kind in nested}:
            nested.append((key, inner))
    tables = [_table(f"{name}.{key}", inner) for key, inner in nested]
    return "\n".join([*lines, "", *tables])


def _default(section: type[BaseModel], key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "from `size`" if section.__name__ == "ModelConfig" else "required"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"see {key}"
    return f"`{json.dumps(value, default=str)}`"


def main() -> None:
    argparse.ArgumentParser(prog="python -m m3ae_fast.config", description=__doc__).parse_args()
    print(page(), end="")


if __name__ == "__main__":
    main()
