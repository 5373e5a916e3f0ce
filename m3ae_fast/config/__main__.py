"""python -m m3ae_fast.config [PAGE]: settings as a Markdown page, docs/config.md or docs/transfer-config.md."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from m3ae_fast.config.messages import section_of
from m3ae_fast.config.schema import Config
from m3ae_fast.config.transfer import TransferConfig

TRAIN_HEAD = """# Settings

All settings of a training run, in the sections of its JSON file; `--set section.key=value` overrides any. Made from
m3ae_fast/config/schema.py by `python -m m3ae_fast.config > docs/config.md`. Those of probes and fine-tuning:
[Transfer settings](transfer-config.md).
"""
TRANSFER_HEAD = """# Transfer settings

Settings of `python -m m3ae_fast.transfer` and `python -m m3ae_fast.features`, which have no file: give them by
`--set section.key=value`. The sections `run` and `data` are as in [a training run](config.md); options such as `--out`
and `--train` set a part of them. Made from m3ae_fast/config/transfer.py by
`python -m m3ae_fast.config transfer > docs/transfer-config.md`.
"""
_INDENT = " " * 6
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def train_page() -> str:
    """Return docs/config.md: a table for each section of a training run."""
    return _Page().write(TRAIN_HEAD, Config)


def transfer_page() -> str:
    """Return docs/transfer-config.md: the sections that only transfer tasks have."""
    training = _Page()
    training.write("", Config)
    return _Page({kind: f"[{name}](config.md{link})" for kind, (name, link) in training.links.items()}).write(
        TRANSFER_HEAD, TransferConfig
    )


PAGES = {"train": train_page, "transfer": transfer_page}


def settings_help(root: type[BaseModel], names: Iterable[str]) -> str:
    """Return the settings of some sections of `root` as lines for --help: default, what is allowed, and meaning."""
    lines = ["settings, given by --set KEY=VALUE; those of data and run are in docs/config.md:"]
    for name in names:
        section = section_of(root.model_fields[name].annotation)
        assert section is not None
        schemas = section.model_json_schema()["properties"]
        for key, field in section.model_fields.items():
            allowed, default = _allowed(schemas[key], "a section"), _default(section, key, field)
            text = f"{' '.join((field.description or '').split())} Default: {default}; allowed: {allowed}."
            lines += [
                "",
                f"  {name}.{key}",
                *wrap(text.replace("`", ""), 100, initial_indent=_INDENT, subsequent_indent=_INDENT),
            ]
    return "\n".join(lines)


class _Page:
    """Tables of sections, each kind of section once.

    Args:
        elsewhere: links to the kinds of section that another page explains.
    """

    def __init__(self, elsewhere: dict[type[BaseModel], str] | None = None) -> None:
        self.elsewhere = elsewhere or {}
        self.links: dict[type[BaseModel], tuple[str, str]] = {}  # a kind's full name, and its anchor on this page

    def write(self, head: str, root: type[BaseModel]) -> str:
        sections = ((name, section_of(field.annotation), field) for name, field in root.model_fields.items())
        parts = [self._tables(name, kind, field.description) for name, kind, field in sections if kind]
        return "\n".join(filter(None, [head, *parts]))

    def _tables(self, name: str, section: type[BaseModel], note: str | None = None) -> str:
        """Return the section's table, and those of the sections in it; nothing where they are written already."""
        if section in self.links or section in self.elsewhere:
            return ""
        self.links[section] = (name, f"#{name.replace('.', '')}")
        about = " ".join(filter(None, (inspect.cleandoc(section.__doc__ or ""), note)))
        lines = [f"## {name}", "", about, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        schemas = section.model_json_schema()["properties"]
        inner = {key: section_of(field.annotation) for key, field in section.model_fields.items()}
        tables = [self._tables(f"{name}.{key}", kind) for key, kind in inner.items() if kind]
        for key, field in section.model_fields.items():
            kind = inner[key]
            allowed = _allowed(schemas[key], self._link(kind) if kind else "")
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{key}` | {_default(section, key, field)} | {allowed} | {meaning} |")
        return "\n".join([*lines, "", *filter(None, tables)])

    def _link(self, section: type[BaseModel]) -> str:
        """Return a link to where a kind of section is explained."""
        return self.elsewhere.get(section) or "[{}]({})".format(*self.links[section])


def _allowed(schema: dict[str, Any], section: str) -> str:
    """Return the values that a field's JSON schema allows. `section`: the link to the section that it names, if any."""
    if "anyOf" in schema:
        return " or ".join(_allowed(one, section) for one in schema["anyOf"])
    if "$ref" in schema:
        return section
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        if "items" in schema:
            return f"list: {_allowed(schema['items'], section)}"
        first, *_ = items = schema["prefixItems"]  # all alike
        return f"list of {len(items)}: {_allowed(first, section)}"
    if kind in ("integer", "number"):
        bounds = [f"{sign} {_number(schema[name])}" for name, sign in BOUNDS.items() if name in schema]
        return " ".join(filter(None, [kind, ", ".join(bounds)]))
    if kind == "boolean":
        return "`true`, `false`"
    return "`null`" if kind == "null" else schema.get("format", kind)


def _number(bound: float) -> str:
    """Return a bound as people read it: powers of two beyond 65,536 as such."""
    if isinstance(bound, int) and bound > 1 << 16 and bound & (bound - 1) == 0:
        return f"2^{bound.bit_length() - 1}"
    return f"{bound:,.15g}"


def _default(section: type[BaseModel], key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "from `size`" if section.__name__ == "ModelConfig" else "required"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"see {key}"
    return f"`{json.dumps(value, default=str)}`"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m m3ae_fast.config", description=__doc__.partition(": ")[2])
    parser.add_argument("page", nargs="?", choices=PAGES, default="train", help="whose settings (default: train)")
    print(PAGES[parser.parse_args(argv).page](), end="")


if __name__ == "__main__":
    main()
