"""Evaluate the representation of a trained model.

m3ae-fast transfer knn runs/large --train 'imagenet/train-*.tar' --val 'imagenet/val-*.tar' --out runs/knn
m3ae-fast transfer knn random:runs/large --train ... --val ... --labels json.label --out runs/knn-random

Labels are whole numbers in KEY.cls, or numbers or names in a field of KEY.json. OUT gets result.json,
pictures and TensorBoard events. Several ranks share the work: torchrun --nproc-per-node 8 -m m3ae_fast transfer ...
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3ae_fast.base import object_store
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.cli.command_line import add_labels, add_resume, add_settings, names_of, output, program
from m3ae_fast.cli.config import settings_help
from m3ae_fast.config.evaluation import TransferConfig, transfer_config
from m3ae_fast.process.launchers import alone
from m3ae_fast.weights.model_name import CLASSIFIER_HELP, MODEL_HELP, PIXELS

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from m3ae_fast.evaluation.classifier import Classifier
    from m3ae_fast.model.encoder import MultimodalEncoder
    from m3ae_fast.process.program import Session

DRAWS = 5  # of --shots, by default
PROBES = ("knn", "linear", "attentive")  # that `compare` can use


class Task(NamedTuple):
    """A module of this package with `run(job) -> result`, which is None where a run was stopped before its end."""

    about: str
    trains: bool = True  # has --train and --labels
    resumes: bool = False  # has --resume
    classifies: bool = False  # MODEL is a classifier; has --labels
    may_classify: bool = False  # MODEL may be one
    modality: str | None = None  # the only one it takes
    surveys: bool = False  # has --layers and --shots
    compares: bool = False  # takes several MODELs, and opens them itself
    takes_pixels: bool = False  # MODEL may be pixels:MODEL
    sections: tuple[str, ...] = ("encode",)  # of settings
    libraries: tuple[str, ...] = ()  # that not every installation has


DIFFERENCE = "difference"
TASKS = {
    "knn": Task(
        "k-nearest-neighbour accuracy of frozen features", surveys=True, takes_pixels=True, sections=("encode", "knn")
    ),
    "linear": Task(
        "train a linear classifier on frozen features; OUT gets the classifier",
        resumes=True,
        surveys=True,
        takes_pixels=True,
        sections=("encode", "linear"),
    ),
    "attentive": Task(
        "train a query that pools the frozen patch tokens, and a linear classifier; all tokens stay in memory",
        modality="image",
        surveys=True,
        sections=("encode", "attentive"),
    ),
    "compare": Task(
        "random weights, downscaled pixels and each MODEL by several probes and seeds: a table, and which differ",
        modality="image",
        compares=True,
        sections=("encode", "knn", "linear", "attentive"),
    ),
    "finetune": Task(
        "train the encoder with a classification head; OUT gets the classifier",
        resumes=True,
        sections=("finetune",),
        libraries=("timm",),
    ),
    "robustness": Task(
        "accuracy of a classifier on attacked and on corrupted images",
        trains=False,
        classifies=True,
        sections=("robustness",),
        libraries=("scipy",),
    ),
    "ood": Task(
        "detect out-of-distribution samples from frozen features or a classifier",
        may_classify=True,
        sections=("encode", "knn"),
        libraries=("sklearn",),
    ),
    "retrieval": Task("find the caption of an image and the image of a caption", trains=False, modality="paired"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("transfer", __doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        command = tasks.add_parser(
            name,
            help=task.about,
            description=task.about,
            epilog=settings_help(TransferConfig, task.sections),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        about = CLASSIFIER_HELP if task.classifies else MODEL_HELP
        about += f"; or {CLASSIFIER_HELP}" if task.may_classify else ""
        about += f"; or {PIXELS}MODEL for the pixels that it sees, scaled down" if task.takes_pixels else ""
        command.add_argument("model", metavar="MODEL", nargs="+" if task.compares else None, help=about)
        shards = "tars: paths, brace patterns, globs, URLs or pipe: commands"
        if task.trains:
            command.add_argument(
                "--train", nargs="+", required=True, metavar="SHARDS", help=f"training samples, {shards}"
            )
        if task.trains or task.classifies:
            add_labels(command)
        command.add_argument("--val", nargs="+", required=True, metavar="SHARDS", help="held-out samples, likewise")
        if not task.classifies:
            command.add_argument(
                "--modality",
                choices=(task.modality,) if task.modality else ("image", "text", "paired"),
                help=f"what the encoder sees of a sample (default: {task.modality or 'image'}, or as the classifier)",
            )
        command.add_argument("--out", type=output(), required=True, metavar="DIR", help="folder for the result")
        add_settings(command, "knn.k=10")
        if name == "ood":
            command.add_argument(
                "--ood",
                action="append",
                nargs="+",
                required=True,
                metavar="[NAME=]SHARDS",
                help="samples of other data; give it again for each of several sets, with names",
            )
        if name == "linear":
            command.add_argument(
                "--cache-features",
                action="store_true",
                help="encode every sample once, without augmentation: takes seconds instead of hours",
            )
        if task.compares:
            _add_comparison(command)
        if task.surveys:
            _add_survey(command)
        if task.resumes:
            add_resume(command, "DIR")
    about = "which of two results on the same samples is better, or that they do not differ significantly"
    command = tasks.add_parser(DIFFERENCE, help=about, description=about)
    command.add_argument("results", metavar="OUT", nargs=2, type=Path, help="the OUT folders of two tasks")
    args = parser.parse_args(argv)
    if hasattr(args, "draws"):
        if args.draws and not args.shots:
            raise UserError(f"--draws {args.draws}: is of --shots; name --shots too, such as 1,5,10, or leave it out")
        args.draws = args.draws or DRAWS
    return args


def _add_survey(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layers",
        metavar="all|N,N",
        help="features after these blocks, from 1, in one pass over the images: OUT gets accuracy by depth, and no "
        "classifier (default: the last one)",
    )
    command.add_argument(
        "--shots",
        type=_counts,
        metavar="N,N",
        help="train on so many samples of each class, drawn several times: 1,5,10 (default: on all)",
    )
    command.add_argument(
        "--draws", type=_draws, metavar="N", help=f"how often --shots are drawn, from 2 (default: {DRAWS})"
    )


def _add_comparison(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--probes",
        type=names_of("probe", PROBES),
        default=PROBES,
        metavar="NAME,NAME",
        help=f"which of {', '.join(PROBES)} (default: all)",
    )
    command.add_argument(
        "--seeds",
        type=int,
        choices=range(1, 101),
        default=3,
        metavar="N",
        help="of each probe, and of random weights (default: 3)",
    )


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers from 1 with commas, such as 1,5,10")
    return sorted({int(part) for part in parts})


def _draws(text: str) -> int:
    if not (text.isdecimal() and int(text) > 1):
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 2")
    return int(text)


def _module(args: argparse.Namespace) -> str:
    """Return the module that does the task."""
    surveys = args.task == "attentive" or getattr(args, "layers", None) or getattr(args, "shots", None)
    surveys = surveys or (args.task == "linear" and _is_pixels(args))  # which no classifier of an encoder is made of
    return "survey" if surveys else args.task


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.task == DIFFERENCE:
        from m3ae_fast.evaluation.difference import compare_results

        print(compare_results(args.results))
        return 0
    if alone():
        _require_libraries(args)  # a missing one is told before the imports, which take seconds
    from m3ae_fast.process.program import joined_program

    with joined_program() as session:
        perform(args, session)
    return 0


def _require_libraries(args: argparse.Namespace) -> None:
    """Raise UserError if a library that the task needs is not installed."""
    needs = dict.fromkeys(("tensorboard", *TASKS[args.task].libraries), args.task)
    require_libraries(needs | ({"scipy": "--shots"} if getattr(args, "shots", None) else {}))
    others = [shards for named in getattr(args, "ood", []) for shards in named]
    object_store.require(*getattr(args, "train", []), *args.val, *others)


def _is_pixels(args: argparse.Namespace) -> bool:
    return isinstance(args.model, str) and args.model.startswith(PIXELS)


def _require_pixels(args: argparse.Namespace) -> None:
    """Raise UserError if the task cannot be done with pixels."""
    if not TASKS[args.task].takes_pixels:
        able = " and ".join(name for name, task in TASKS.items() if task.takes_pixels)
        raise UserError(f"{args.model}: {args.task} does not take pixels; {able} do")
    if args.layers is not None or getattr(args, "resume", "no") != "no":
        raise UserError(f"{args.model}: pixels have no layers and no checkpoints; leave --layers and --resume out")


def _is_classifier(args: argparse.Namespace) -> bool:
    """Return whether MODEL is to be opened as a classifier."""
    from m3ae_fast.evaluation.classifier import CONFIG_FILE

    task = TASKS[args.task]
    return task.classifies or (task.may_classify and (Path(args.model) / CONFIG_FILE).is_file())


def _modality(args: argparse.Namespace) -> str:
    """Return what the encoder sees. Raises UserError where it is asked for other than what the classifier does."""
    from m3ae_fast.evaluation.classifier import read_config

    given = getattr(args, "modality", None)
    if not _is_classifier(args):
        return given or TASKS[args.task].modality or "image"
    own = read_config(args.model).modality
    if given not in (None, own):
        raise UserError(f"--modality {given}: the classifier {args.model} sees {own}; leave it out")
    return own


def _config(args: argparse.Namespace) -> TransferConfig:
    val = [{"shards": args.val, "modality": args.modality}]
    train = [{"shards": args.train, "modality": args.modality}] if TASKS[args.task].trains else val
    sections = ("encode", *args.probes) if TASKS[args.task].compares else TASKS[args.task].sections
    given = {"run": {"dir": str(args.out)}, "data": {"train": train, "val": val}}
    return transfer_config(given, args.set, (args.task, sections))


def perform(args: argparse.Namespace, session: Session) -> None:
    """Do the task and write its result. Raises UserError where that is not possible; OUT then has no result."""
    from m3ae_fast.base.hardware import keep_freed_memory
    from m3ae_fast.evaluation.classifier import Classifier
    from m3ae_fast.evaluation.difference import against_largest_class
    from m3ae_fast.evaluation.job import Job, refuse_existing, show_result, summary, write_result
    from m3ae_fast.training.run_folder import RunFolder
    from m3ae_fast.weights.open_model import open_encoder, set_images

    ranks = session.ranks
    ranks.on_main(lambda: _require_libraries(args))
    if _is_pixels(args):
        _require_pixels(args)
    args.modality = ranks.broadcast(lambda: _modality(args))
    config = ranks.broadcast(lambda: _config(args))
    ranks.on_main(lambda: refuse_existing(config.run.dir))
    started = time.perf_counter()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    model: MultimodalEncoder | Classifier | None
    if TASKS[args.task].compares:
        model = None
    elif _is_classifier(args):
        model = Classifier.from_pretrained(args.model)
    else:
        text = args.modality != "image"
        model = open_encoder(args.model, text=text, tokenizer=config.data.tokenizer, seed=config.run.seed)
    if model is not None:
        encoder = model.backbone if isinstance(model, Classifier) else model
        set_images(encoder, config.data.range, config.encode.resize)
        model = model.to(ranks.device).eval()
    with ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        job = Job(args, config, session, folder, model)
        result: dict[str, Any] | None = importlib.import_module(f"m3ae_fast.evaluation.{_module(args)}").run(job)
        if result is None:
            return
        result = job.described(result | {"seconds": round(time.perf_counter() - started, 1)}, partial=False)
        result |= ranks.on_main(lambda: against_largest_class(job.out)) or {}
        ranks.on_main(lambda: write_result(job.out, result))
        for draw in job.pictures:
            ranks.on_main(draw)
        ranks.on_main(lambda: show_result(job.out, result))
        job.say(f"{args.task}: {summary(result)}")
        if "verdict" in result:
            job.say(f"{args.task}: {result['verdict']}")


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
