"""Evaluate the representation of a trained model.

m3ae-fast evaluate knn runs/large --train 'imagenet/train-*.tar' --val 'imagenet/val-*.tar' --out runs/knn
m3ae-fast evaluate knn random:runs/large --train ... --val ... --labels json.label --out runs/knn-random

Labels are integers in KEY.cls (the default), or integers or names in a field of KEY.json (--labels json.FIELD). For knn
and logistic, the field may also contain lists of them. The output folder, OUT, contains result.json, the predictions of
all held-out samples, figures and TensorBoard events.
On several GPUs: torchrun --nproc-per-node 8 -m m3ae_fast evaluate ...

To list the options and settings of a task, add --help after its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.command_line import add_labels, add_resume, add_settings, names_of, output, program, use_device
from m3ae_fast.config import POOLS
from m3ae_fast.config.describe import settings_help
from m3ae_fast.evaluation.tasks import (
    MODALITIES,
    MOST_SEEDS,
    PROBE_NAMES,
    TASKS,
    Task,
    named_sets,
    require_for,
)
from m3ae_fast.process.launchers import alone
from m3ae_fast.weights.model_name import CLASSIFIER_HELP, FEATURES_HELP, IMAGE_FEATURES, MODEL_HELP


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("evaluate", __doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        _add_task(tasks, name, task)
    args = parser.parse_args(argv)
    if hasattr(args, "ood"):
        args.ood = named_sets(args.ood)
    return args


def _add_task(tasks: Any, name: str, task: Task) -> None:
    command = tasks.add_parser(
        name,
        help=task.about,
        description=task.about,
        epilog=settings_help(task.uses),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = CLASSIFIER_HELP if task.classifies else MODEL_HELP
    about += f"; or {CLASSIFIER_HELP}" if task.may_classify else ""
    if task.takes_image_features:
        about += f"; or {', '.join(IMAGE_FEATURES)} for features that are computed from the images without a network"
    if task.compares:
        about += f"; {FEATURES_HELP}"
        about += ". Without --train, --val and --out: the OUT folders of two or more tasks on the same samples"
    command.add_argument("model", metavar="MODEL", nargs="+" if task.compares else None, help=about)
    needed = not task.compares  # results that exist are compared without them
    shards = "tar files (paths, brace patterns, globs, URLs or pipe: commands)"
    if task.trains:
        text = f"training samples in {shards}"
        command.add_argument("--train", nargs="+", required=needed, default=[], metavar="SHARDS", help=text)
    if task.has_labels:
        add_labels(command)
    command.add_argument(
        "--val", nargs="+", required=needed, default=[], metavar="SHARDS", help=f"held-out samples in {shards}"
    )
    if not task.classifies and task.modality is None:
        classifier = ", or the input of the classifier" if task.may_classify else ""
        command.add_argument(
            "--modality",
            choices=MODALITIES,
            help=f"input of the encoder (default: image{classifier})",
        )
    command.add_argument("--out", type=output(), required=needed, metavar="OUT", help="output folder")
    add_settings(command, task.example)
    if name == "ood":
        _add_outside_sets(command)
    if task.compares:
        _add_comparison(command)
    if task.has_probe_grid:
        _add_grid_options(command, name)
    if task.has_baselines:
        command.add_argument(
            "--no-baselines",
            dest="baselines",
            action="store_false",
            help="do not evaluate the baselines, which are random weights and features that are computed without a "
            "network (default: they are evaluated, unless MODEL is a baseline or the encoder sees captions)",
        )
    if task.resumes:
        add_resume(command, "OUT")


def _add_outside_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ood",
        action="append",
        nargs="+",
        required=True,
        metavar="[NAME=]SHARDS",
        help="out-of-distribution samples; for several sets, repeat the option with a different NAME for each set",
    )


def _add_grid_options(command: argparse.ArgumentParser, task: str) -> None:
    command.add_argument(
        "--layers",
        metavar="all|N,N",
        help="evaluate the features after each of these blocks, numbered from 1, in one pass over the images; OUT "
        "contains accuracies by depth, but no classifier (default: the last block)",
    )
    features = f"the features of each of these poolings ({', '.join(POOLS)})"
    if task == "attentive":
        same = "in the same training steps as the attentive probes and with the same hyper-parameters"
        about = f"also train linear classifiers on {features}, {same}"
        default = "only attentive probes"
    else:
        about, default = f"evaluate {features} in one pass over the images", "only the pooling of encode.pool"
    command.add_argument(
        "--pools",
        type=lambda text: [*POOLS] if text == "all" else names_of("pooling", POOLS)(text),
        default=[],
        metavar="all|NAME,NAME",
        help=f"{about}; OUT contains no classifier (default: {default})",
    )
    command.add_argument(
        "--shots",
        type=_counts,
        default=[],
        metavar="N,N",
        help="few-shot evaluation: numbers of training samples per class, such as 1,5,10; for each number, samples "
        "are drawn several times (default: use all samples)",
    )


def _add_comparison(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--probes",
        type=names_of("probe", PROBE_NAMES),
        default=PROBE_NAMES,
        metavar="NAME,NAME",
        help=f"probes to run, from {', '.join(PROBE_NAMES)} (default: all)",
    )
    command.add_argument(
        "--seeds",
        type=int,
        choices=range(1, MOST_SEEDS + 1),
        default=3,
        metavar="N",
        help="number of random seeds for the probes and for the randomly initialised model (default: 3)",
    )


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be a comma-separated list of integers from 1, such as 1,5,10")
    return sorted({int(part) for part in parts})


def main(argv: list[str] | None = None) -> int:
    given = vars(parse_args(argv))
    if TASKS[given["task"]].compares:
        if given == vars(parse_args([given["task"], *given["model"]])):  # no options
            from m3ae_fast.evaluation.difference import compare_results

            print(compare_results([*map(Path, given["model"])]))
            return 0
        if missing := [name for name in ("train", "val", "out") if not given[name]]:
            raise UserError(
                f"--{missing[0]}: is needed to compare models; to compare results, specify only their folders"
            )
    given.pop("local_rank")
    use_device(given["device"])
    if alone():  # reports a missing library before the imports, which take seconds
        ood = [each for named in given.get("ood", {}).values() for each in named]
        require_for(given["task"], [*given.get("train", []), *given["val"], *ood], given.get("shots", []))
    from m3ae_fast.evaluation.task_runner import evaluate

    evaluate(given.pop("task"), given.pop("model"), overrides=given.pop("set"), **given)
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
