"""Write the generated pages, docs/config.md, docs/evaluation-config.md and docs/evaluation-tasks.md:
python docs/write_settings.py"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from pydantic import BaseModel

from m3ae_fast.config.describe import allowed_values, default_value
from m3ae_fast.config.evaluation import EvaluationConfig, Uses
from m3ae_fast.config.messages import section_of
from m3ae_fast.config.settings import Config
from m3ae_fast.evaluation.tasks import TASKS

TRAIN_HEAD = """# Settings

This page lists all settings of a training run, grouped by the sections of the JSON config file. A config contains only
the settings whose values differ from the defaults ([example](guide/training.md#your-own-config)). `data.train` and
either `train.epochs` or `train.steps` are required. On the command line, `--set section.key=value` overrides a setting,
for example `--set train.epochs=200`.

[Terms](index.md#terms) explains words such as shard, lane and rank. The settings of probes and fine-tuning are on
another page: [Evaluation settings](evaluation-config.md).

`python docs/write_settings.py` generates this page from m3ae_fast/config/settings.py.
"""
EVALUATION_HEAD = """# Evaluation settings

Settings of [`m3ae-fast evaluate`](evaluation-tasks.md) and `m3ae-fast embed`. These commands have no config file; their
settings are passed with `--set section.key=value`. A command or task accepts only the settings that it uses:

{readers}

Each of them also uses the sections `run` and `data`, which are described on the page [Settings](config.md). Some of the
settings in these two sections have their own options, such as `--out` and `--train`.
{data}

`linear` and `finetune` use settings of [training](config.md). The defaults that differ from those of training are in
parentheses. Derived defaults follow this [rule](evaluation-tasks.md#default-hyper-parameters-by-dataset-size), and a
resumed run keeps them.

{shared}

`python docs/write_settings.py` generates this page from m3ae_fast/config/evaluation.py.
"""


def train_page() -> str:
    """Return docs/config.md: a table for each section of a training run."""
    own = {kind: about for kind, about in _sections(EvaluationConfig).items() if kind not in _sections(Config)}
    return _page(TRAIN_HEAD, Config, _links(own, "evaluation-config.md"))


def evaluation_page() -> str:
    """Return docs/evaluation-config.md: the sections that only the tasks of `evaluate` have."""
    head = EVALUATION_HEAD.format(readers=_readers(), shared=_shared(), data=_data())
    return _page(head, EvaluationConfig, _links(_sections(Config), "config.md"))


def _readers() -> str:
    """Return a table of the tasks of `evaluate`, and of `embed`, with the sections that each of them uses. If a
    task uses only some settings of a section, their keys follow, unless the section is on the page of training."""

    def link(uses: Uses, section: str) -> str:
        if section in Config.model_fields:
            return f"[{section}](config.md#{section})"
        only = "" if section in uses else f" (only {', '.join(f'`{key}`' for key in uses.keys(section))})"
        return f"[{section}](#{section}){only}"

    lines = ["| task | sections |", "|---|---|"]
    for name, uses in [*((name, task.uses) for name, task in TASKS.items()), ("m3ae-fast embed", Uses())]:
        lines.append(f"| {name} | {', '.join(link(uses, section) for section in uses.sections)} |")
    return "\n".join(lines)


def _data() -> str:
    """Return sentences that name the settings of the section `data` that the tasks use."""
    uses = {name: task.uses.keys("data") for name, task in TASKS.items()}
    common = Uses().keys("data")
    readers: dict[tuple[str, ...], list[str]] = {}
    for task, keys in uses.items():
        if more := tuple(key for key in keys if key not in common):
            readers.setdefault(more, []).append(f"`{task}`")
    lines = [f"Of `data`, they use {_listed(common)}."]
    lines += [
        f"{_listed(tasks, '')} also {'use' if len(tasks) > 1 else 'uses'} {_listed(keys)}."
        for keys, tasks in readers.items()
    ]
    return "\n".join(wrap(" ".join(lines), 120))


def _listed(names: Sequence[str], quote: str = "`") -> str:
    *first, last = (f"{quote}{name}{quote}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _shared() -> str:
    """Return a table of the settings of training that tasks use."""
    lines = ["| task | section | settings |", "|---|---|---|"]
    for task, uses in ((name, task.uses) for name, task in TASKS.items()):
        for section in ("optim", "train", "deepspeed"):
            if section in uses:
                lines.append(f"| {task} | {section} | all settings ({uses.default(section)}) |")
            elif keys := uses.keys(section):
                own = ((key, uses.default(f"{section}.{key}")) for key in keys)
                shown = [f"`{key}`" + (f" ({default})" if default else "") for key, default in own]
                lines.append(f"| {task} | {section} | {', '.join(shown)} |")
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
    explains; these sections get no table."""
    sections, known = _sections(root), elsewhere or {}
    links = _links(sections) | known
    tables = [_table(kind, *about, links) for kind, about in sections.items() if kind not in known]
    return "\n".join([head, *tables])


def _table(section: type[BaseModel], name: str, note: str, links: dict[type[BaseModel], str]) -> str:
    elsewhere = [base for base in section.__mro__[1:] if base in links]  # the section classes from which it inherits
    more = [f"It also has the settings of {links[base]}." for base in elsewhere]
    about = " ".join(filter(None, (inspect.cleandoc(section.__doc__ or ""), note, *more)))
    lines = [f"## {name}", "", about, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
    schemas = section.model_json_schema()["properties"]
    for key, field in section.model_fields.items():
        if any(key in base.model_fields for base in elsewhere):
            continue
        kind = section_of(field.annotation)
        allowed = allowed_values(schemas[key], links[kind] if kind else "")
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{key}` | {default_value(section, key, field)} | {allowed} | {meaning} |")
    return "\n".join([*lines, ""])


sys.path.insert(0, str(Path(__file__).parent))
from write_tasks import tasks_page  # noqa: E402

PAGES = {"config.md": train_page, "evaluation-config.md": evaluation_page, "evaluation-tasks.md": tasks_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
