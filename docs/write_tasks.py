"""Write the page of evaluation tasks, docs/evaluation-tasks.md, from their declarations, for write_settings.py."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence

from m3ae_fast.config.arguments import Arguments, add_arguments
from m3ae_fast.evaluation import tasks
from m3ae_fast.evaluation.tasks import TASKS, Task
from m3ae_fast.heads.training_defaults import IMAGENET, OFFICIAL

HEAD = """# Evaluation tasks

This page describes the tasks of `m3ae-fast evaluate` and their options. [Evaluating a model](guide/evaluating.md)
shows how to use them, and [Evaluation settings](evaluation-config.md) explains the settings, which are passed with
`--set`. In Python, the options are arguments of `m3ae_fast.evaluate`.

```
m3ae-fast evaluate logistic runs/large --train 'train-*.tar' --val 'val-*.tar' --labels json.name --out runs/logistic
m3ae-fast evaluate logistic runs/large --layers all --pools all --train 'train-*.tar' --val 'val-*.tar' --out runs/depth
m3ae-fast evaluate knn runs/large --shots 1,5,10 --train 'train-*.tar' --val 'val-*.tar' --out runs/shots
m3ae-fast evaluate finetune runs/large --train 'train-*.tar' --val 'val-*.tar' --out runs/finetune --resume auto
m3ae-fast evaluate robustness runs/finetune --val 'val-*.tar' --out runs/robustness
m3ae-fast evaluate ood runs/large --train 'train-*.tar' --val 'val-*.tar' --ood 'other/*.tar' --out runs/ood
m3ae-fast evaluate ood runs/finetune --train 't.tar' --val 'v.tar' --ood svhn='svhn/*.tar' --ood dtd='dtd/*.tar' --out o
```

`python docs/write_settings.py` generates this page from m3ae_fast/evaluation/tasks.py.
"""
SHARED: dict[str, type[Arguments]] = {  # sections that describe what several tasks have in common
    "Baselines": tasks.WithBaselines,
    "Layers, poolings and few samples": tasks.WithGrid,
    "Lists of labels": tasks.WithLists,
}
SIZES = (1_000, 10_000, 50_000, IMAGENET)
RULE = """## Default hyper-parameters by dataset size

You do not need to set a batch size or a learning rate. `linear` and `finetune` derive these values from the number of
training samples, and print them before the first step. `attentive` has the batch size and the number of steps of
`linear`. Any of the values can be set, for example with `--set optim.peak_lr=0.1`; the remaining values are still
derived.

{table}

- At ImageNet's size (the last row), the hyper-parameters are the official ones.
- With fewer samples, the batch size is reduced to keep the number of steps per epoch about the same, but it is at
  least 256 for the linear probe and 64 for fine-tuning (or, with fewer training samples, about their number).
- If the usual number of epochs gives too few steps, the number of epochs is increased. Fine-tuning takes at least 4,000
  steps with the smallest batch.
- The peak learning rate of the probe is raised if there are fewer steps than for ImageNet. For a batch of 256, the peak
  learning rate multiplied by the number of steps is at most about 5 times the number of training samples.

`m3ae_fast/heads/training_defaults.py` explains the reasons, and `lab/results/recipe.md` contains a comparison with
other values. At the end, a task warns if the training accuracy was still rising, if the number of steps was small, or
if the learning rate that the attentive probe selected was the lowest or the highest candidate.
"""


def tasks_page() -> str:
    """Return docs/evaluation-tasks.md: a section for each task, and sections about what several tasks have in
    common."""
    parts = [HEAD, *(_task(name, task) for name, task in TASKS.items()), _common()]
    parts += [f"## {title}\n\n{_own(kind)}\n" for title, kind in SHARED.items()]
    return "\n".join([*parts, RULE.format(table=_hyper_parameters())])


def _task(name: str, task: type[Task]) -> str:
    """Return the section of a task."""
    shared = [f"[{title}](#{_anchor(title)})" for title, kind in SHARED.items() if issubclass(task, kind)]
    more = f"This task also has these options: {', '.join(['[common options](#common-options)', *shared])}."
    sections = ", ".join(
        f"[{section}]({'config' if section in ('optim', 'train', 'deepspeed') else 'evaluation-config'}.md#{section})"
        for section in task.uses.sections
    )
    return f"## {name}\n\n{_own(task)}\n\n{more} Settings: {sections}.\n"


def _own(kind: type[Arguments]) -> str:
    """Return the description of a class, and a table of the options that it declares."""
    about = inspect.cleandoc(kind.__doc__ or "")
    text = about.partition("\n\n")[2] if kind in SHARED.values() else about
    rows = _rows(kind, [name for name in kind.__annotations__ if name != "model"])
    return "\n\n".join(filter(None, [text, _table(("option", "meaning"), rows)]))


def _common() -> str:
    """Return the section about the options that most tasks have."""
    users: dict[tuple[str, str], list[str]] = {}  # the tasks by option and meaning
    special = {name for kind in SHARED.values() for name in kind.__annotations__} - {"model"}
    for name, task in TASKS.items():
        shared = [field for field in task.model_fields if field not in special | {*task.__annotations__}]
        for row in _rows(task, shared):
            users.setdefault(row, []).append(name)
    rows = [(*row, "all" if len(names) == len(TASKS) else ", ".join(names)) for row, names in users.items()]
    first = sorted(rows, key=lambda row: row[0].startswith("`-"))  # MODEL, then the options
    return f"## Common options\n\n{_table(('option', 'meaning', 'tasks'), first)}\n"


def _rows(kind: type[Arguments], fields: list[str]) -> list[tuple[str, str]]:
    """Return, for each of some fields of a class, its form on the command line and its help."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser, kind)
    found = {action.dest: action for action in parser._actions}
    return [(f"`{_form(found[field])}`", _escaped(found[field].help or "")) for field in fields if field in found]


def _form(action: argparse.Action) -> str:
    value = action.metavar or (",".join(map(str, action.choices)) if action.choices else "")
    return _escaped(" ".join(filter(None, [*action.option_strings, str(value)])))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]) if lines else ""


def _anchor(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")


def _hyper_parameters() -> str:
    """Return the table of the values that `linear` and `finetune` derive from the number of training samples."""
    columns = ("batch size", "epochs", "steps", "`peak_lr`")
    head = ("training samples", *(f"{task}: {column}" for task in OFFICIAL for column in columns))
    rows = []
    for samples in SIZES:
        row = [f"{samples:,}"]
        for official in OFFICIAL.values():
            found = official.scaled(samples)
            steps = found.epochs * (samples // found.global_batch)
            row += [f"{value:,.6g}" for value in (found.global_batch, found.epochs, steps, found.peak_lr)]
        rows.append(tuple(row))
    return _table(head, rows)
