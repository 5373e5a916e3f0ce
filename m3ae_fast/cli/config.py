"""m3ae-fast config [PAGE]: print all settings as a Markdown page, docs/config.md or docs/evaluation-config.md."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import program
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.config.messages import section_of
from m3ae_fast.config.schema import IMAGE_SETTINGS, Config, ModelConfig
from m3ae_fast.evaluation.tasks import TASKS

TRAIN_HEAD = """# Settings

This page lists all settings of a training run, grouped by the sections of the JSON config file. A config contains only
the settings whose values differ from the defaults ([example](guide/training.md#your-own-config)). `data.train` and
either `train.epochs` or `train.steps` are required. On the command line, `--set section.key=value` overrides a setting,
for example `--set train.epochs=200`.

[Terms](index.md#terms) explains words such as shard, lane and rank. The settings of probes and fine-tuning are on
another page: [Evaluation settings](evaluation-config.md).

`m3ae-fast config > docs/config.md` generates this page from m3ae_fast/config/schema.py.
"""
EVALUATION_HEAD = """# Evaluation settings

Settings of [`m3ae-fast evaluate`](guide/evaluating.md) and `m3ae-fast embed`. These commands have no config file; their
settings are passed with `--set section.key=value`. A command or task accepts only the settings that it uses:

{table}

Each of them also uses the sections `run` and `data`, which are described on the page [Settings](config.md). Some of the
settings in these two sections have their own options, such as `--out` and `--train`.

`m3ae-fast config evaluation > docs/evaluation-config.md` generates this page from m3ae_fast/config/evaluation.py.
"""
_INDENT = " " * 6
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def train_page() -> str:
    """Return docs/config.md: a table for each section of a training run."""
    return _page(TRAIN_HEAD, Config)


def evaluation_page() -> str:
    """Return docs/evaluation-config.md: the sections that only the tasks of `evaluate` have."""
    return _page(EVALUATION_HEAD.format(table=_readers()), EvaluationConfig, _links(_sections(Config), "config.md"))


def _readers() -> str:
    """Return a table of the tasks of `evaluate`, and of `embed`, with the sections that each of them reads."""
    rows = [*((name, task.sections) for name, task in TASKS.items()), ("m3ae-fast embed", ("encode",))]
    lines = [f"| {name} | {', '.join(f'[{each}](#{each})' for each in sections)} |" for name, sections in rows]
    return "\n".join(["| task | sections |", "|---|---|", *lines])


PAGES = {"train": train_page, "evaluation": evaluation_page}


def settings_help(root: type[BaseModel], names: Iterable[str]) -> str:
    """Return the settings of some sections of `root` as lines for --help: default, allowed values and meaning."""
    lines = ["settings, which are passed with --set KEY=VALUE (for the settings of data and run, see docs/config.md):"]
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


_Sections = dict[type[BaseModel], tuple[str, str]]


def _sections(root: type[BaseModel], above: str = "") -> _Sections:
    """Return the sections in `root`, including nested ones. A section class that occurs several times is listed once,
    with the full name and the description of its first occurrence. The description of a nested section is empty."""
    found: _Sections = {}
    for key, field in root.model_fields.items():
        if kind := section_of(field.annotation):
            own = {kind: (above + key, "" if above else field.description or "")}
            for each, about in (own | _sections(kind, f"{above}{key}.")).items():
                found.setdefault(each, about)
    return found


def _links(sections: _Sections, page: str = "") -> dict[type[BaseModel], str]:
    return {kind: f"[{name}]({page}#{name.replace('.', '')})" for kind, (name, _) in sections.items()}


def _page(head: str, root: type[BaseModel], elsewhere: dict[type[BaseModel], str] | None = None) -> str:
    """Return a page with a table for each section class. `elsewhere`: links to the sections that another page
    explains; these get no table."""
    sections, known = _sections(root), elsewhere or {}
    links = _links(sections) | known
    tables = [_table(kind, *about, links) for kind, about in sections.items() if kind not in known]
    return "\n".join([head, *tables])


def _table(section: type[BaseModel], name: str, note: str, links: dict[type[BaseModel], str]) -> str:
    about = " ".join(filter(None, (inspect.cleandoc(section.__doc__ or ""), note)))
    lines = [f"## {name}", "", about, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
    schemas = section.model_json_schema()["properties"]
    for key, field in section.model_fields.items():
        if section is ModelConfig and key in IMAGE_SETTINGS:  # these are set in `data`
            continue
        kind = section_of(field.annotation)
        allowed = _allowed(schemas[key], links[kind] if kind else "")
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{key}` | {_default(section, key, field)} | {allowed} | {meaning} |")
    return "\n".join([*lines, ""])


def _allowed(schema: dict[str, Any], section: str) -> str:
    """Return the values that a field's JSON schema allows. `section`: link to the section that is the field's type, if
    any."""
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
        first, *_ = items = schema["prefixItems"]  # all items have the same schema
        return f"list of {len(items)}: {_allowed(first, section)}"
    if kind in ("integer", "number"):
        bounds = [f"{sign} {_number(schema[name])}" for name, sign in BOUNDS.items() if name in schema]
        return " ".join(filter(None, [kind, ", ".join(bounds)]))
    if kind == "boolean":
        return "`true`, `false`"
    return "`null`" if kind == "null" else schema.get("format", kind)


def _number(bound: float) -> str:
    """Return a bound in readable form: powers of two above 65,536 are written as powers."""
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


def main(argv: list[str] | None = None) -> int:
    parser = program("config", (__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "page",
        nargs="?",
        choices=PAGES,
        default="train",
        help="settings to print: those of training, or those of evaluation (default: train)",
    )
    print(PAGES[parser.parse_args(argv).page](), end="")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
