"""Evaluate the representation of a trained model.

m3ae-fast evaluate knn runs/large --train 'train-*.tar' --val 'val-*.tar' --out runs/knn
m3ae-fast evaluate logistic runs/large --train ... --val ... --labels json.label --out runs/logistic

Labels are integers in KEY.cls (the default), or integers or names in a field of KEY.json (--labels
json.FIELD). The output folder, OUT, contains result.json, predictions, figures and TensorBoard events.
On several GPUs: torchrun --nproc-per-node 8 -m m3ae_fast evaluate ...

--help after the name of a task explains its options, and --help all also its settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_local_rank, checked, program, refuse, use_device
from m3ae_fast.config.arguments import add_arguments
from m3ae_fast.config.describe import settings_help
from m3ae_fast.evaluation.tasks import TASKS, Compare, Task
from m3ae_fast.process.launchers import alone


def parse_args(argv: list[str] | None) -> tuple[type[Task], dict[str, Any]]:
    """Return the task, and the options that are given."""
    parser = program("evaluate", __doc__)
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        command = commands.add_parser(
            name,
            help=task.about(),
            description=fill(task.about(), 100),
            epilog=settings_help(task.uses),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command, task, needed=task is not Compare)  # results that exist are compared without samples
        add_local_rank(command)
    given = vars(parser.parse_args(argv))
    return TASKS[given.pop("task")], given


def main(argv: list[str] | None = None) -> int:
    task, given = parse_args(argv)
    if task is Compare:
        if given.keys() == {"model"}:
            from m3ae_fast.evaluation.compare_results import compare_results

            print(compare_results([*map(Path, given["model"])]))
            return 0
        if missing := [name for name in ("train", "val", "out") if name not in given]:
            refuse(f"--{missing[0]}: is needed to compare models; to compare results, specify only their folders")
    options = checked(task, given)
    use_device(options.device)
    if alone():  # reports a missing library before the imports, which take seconds
        options.require()
    from m3ae_fast.evaluation.task_runner import evaluate

    evaluate(options)
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
