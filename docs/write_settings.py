"""Write the pages of all settings, docs/config.md and docs/evaluation-config.md: python docs/write_settings.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from pydantic import BaseModel

from m3ae_fast.config.describe import allowed_values, default_value
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

`python docs/write_settings.py` generates this page from m3ae_fast/config/schema.py.
"""
EVALUATION_HEAD = """# Evaluation settings

Settings of [`m3ae-fast evaluate`](guide/evaluating.md) and `m3ae-fast embed`. These commands have no config file; their
settings are passed with `--set section.key=value`. A command or task accepts only the settings that it uses:

{table}

Each of them also uses the sections `run` and `data`, which are described on the page [Settings](config.md). Some of the
settings in these two sections have their own options, such as `--out` and `--train`.

`python docs/write_settings.py` generates this page from m3ae_fast/config/evaluation.py.
"""


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
        allowed = allowed_values(schemas[key], links[kind] if kind else "")
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{key}` | {default_value(section, key, field)} | {allowed} | {meaning} |")
    return "\n".join([*lines, ""])


PAGES = {"config.md": train_page, "evaluation-config.md": evaluation_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
