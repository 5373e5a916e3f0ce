"""Train a model on shards, with the settings of a config. `m3ae-fast pretrain` chooses the settings.

m3ae-fast train --config quickstart
m3ae-fast train --config base --train 'shards/train-*.tar' --val 'shards/val-*.tar' --out runs/mine
m3ae-fast train --config large --recipe fast --dry-run
torchrun --nproc-per-node 8 -m m3ae_fast train --config large --set optim.peak_lr=3e-4
deepspeed --num_gpus 8 --module m3ae_fast.train --config large   # in a clone: m3ae_fast/train.py
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from m3ae_fast.base.signal_numbers import SIGNALS

if __name__ == "__main__":  # `StopRequest` handles signals that arrive during the import of torch, which takes seconds
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.base.progress import working
from m3ae_fast.cli.command_line import (
    add_resume,
    add_samples,
    add_setting,
    add_settings,
    program,
    use_device,
)
from m3ae_fast.config import Overrides, load_config, override_list, require_libraries_of, shipped_configs
from m3ae_fast.config.arguments import output
from m3ae_fast.config.recipes import HELP, NAMES, with_recipe
from m3ae_fast.process.launchers import alone

if TYPE_CHECKING:  # torch is imported only where it is used, so that --help and config errors appear at once
    from m3ae_fast.base.environment import Device
    from m3ae_fast.config import Config
    from m3ae_fast.config.recipes import Recipe
    from m3ae_fast.process.session import Session


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("train", __doc__)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help=f"a JSON config file, or the name of a config that comes with m3ae-fast: {', '.join(shipped_configs())}",
    )
    add_samples(parser, "--train", "data.train", "training samples, in place of the config's data.train")
    add_samples(parser, "--val", "data.val", "held-out samples, in place of the config's data.val")
    add_setting(parser, "--out", "run.dir", output(), "the run folder")
    parser.add_argument(
        "--recipe",
        choices=NAMES,
        help=f"settings that replace those of the config; {HELP}, with the length, warm-up and pixel statistics of its "
        "training on ImageNet (default: the settings of the config)",
    )
    more = parser.add_argument_group("further options")
    add_settings(parser, more, "train.epochs=20")
    add_resume(parser, "run.dir")
    more.add_argument(
        "--profile", action="store_true", help="write a torch profiler trace of some steps to trace.json.gz in run.dir"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, shards, tokenizer and probe; print the model size and a memory estimate; measure a few "
        "steps, and print the expected duration of the run on this machine; then exit",
    )
    dry = parser.add_argument_group("options of --dry-run")
    dry.add_argument(
        "--world",
        type=int,
        metavar="N",
        help="plan for N GPUs of another machine: print the FLOPs, the network traffic and the memory per GPU, and the "
        "shortest possible step on several kinds of GPUs, instead of measuring steps (default: this machine)",
    )
    dry.add_argument(
        "--no-data",
        action="store_true",
        help="do not open the shards or the tokenizer, for example because they are on another machine",
    )
    args = parser.parse_args(argv)
    if (args.world is not None or args.no_data) and not args.dry_run:
        parser.error("--world and --no-data can be used only with --dry-run")
    if args.world is not None and args.world < 1:
        parser.error(f"--world {args.world}: must be 1 or more")
    return args


def train(
    config: str | Path,
    *,
    train: str | Sequence[str] = (),
    val: str | Sequence[str] = (),
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    overrides: Overrides = (),
    resume: str = "no",
    device: Device | None = None,
) -> Path:
    """Train a model on shards, and return the run folder. `m3ae_fast.pretrain` chooses the settings for you.

    Args:
        config: a JSON config file, or the name of a config that comes with m3ae-fast.
        train, val: shards of training and of held-out samples, in place of those in the config.
        out: the run folder, in place of that in the config.
        recipe: "official", "fast", "hog" or "mae": a group of settings that replace those of the config
            (`m3ae_fast.config.recipes`); `overrides` take precedence. None: the settings of the config.
        overrides: overrides of the config's settings (`--set` of the command): "section.key=value", a list of such
            texts, or a dict such as {"train.epochs": 20}.
        resume: "auto" to continue from the last checkpoint in the run folder, if any; "no" to start a new run; or the
            path of a checkpoint or run folder.
        device: "cpu" or "cuda" (one GPU per rank); None: a GPU if there is one, otherwise the CPU.

    Raises:
        UserError: the config is invalid; data, weights or a library are missing or do not fit it; or the run cannot be
            written.
    """
    from m3ae_fast.evaluation.knn_during_training import knn_probe
    from m3ae_fast.process.session import joined_program
    from m3ae_fast.training.run import pre_train

    given = {"data.train": _samples(train), "data.val": _samples(val), "run.dir": None if out is None else str(out)}
    own = override_list({name: value for name, value in given.items() if value}) + override_list(overrides)
    changes = with_recipe(recipe, own)
    with joined_program(device) as session:
        session.ranks.require_same({"config": str(config), "changes": changes, "resume": resume})
        pre_train(
            session.ranks.broadcast(lambda: load_config(config, changes)), session, resume=resume, make_probe=knn_probe
        )
    return load_config(config, changes).run.dir


def _samples(shards: str | Sequence[str]) -> list[dict[str, Any]]:
    """Return the value of data.train or data.val for shards."""
    return [{"shards": [shards] if isinstance(shards, str) else list(shards)}] if shards else []


class _Program(ModuleType):
    """A module that can be called, because `m3ae_fast.train` is this program and also a function."""

    __call__ = staticmethod(train)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    use_device(args.device)
    if alone():  # reports mistakes before the imports, which take seconds
        _load(args, ranks=1)
    with working("importing torch", show=args.dry_run and alone()):
        from m3ae_fast.process.session import joined_program

    with joined_program(args.device) as session:
        perform(args, session)
    return 0  # also after a request to stop


def _load(args: argparse.Namespace, ranks: int) -> Config:
    """Return the config. Raises UserError if it is invalid, or if a library that a run on this machine with this number
    of ranks requires is not installed."""
    config = load_config(args.config, with_recipe(args.recipe, args.set))
    if args.world is None and not args.no_data:
        require_libraries_of(config, ranks)
    return config


def perform(args: argparse.Namespace, session: Session) -> None:
    """Run the command: a dry run or a training run. Raises UserError if the run is not possible, or if the ranks have
    different options."""
    from m3ae_fast.base.hardware import unused_gpus
    from m3ae_fast.evaluation.knn_during_training import knn_probe
    from m3ae_fast.training.run import pre_train

    session.ranks.require_same({name: value for name, value in vars(args).items() if name != "local_rank"})
    config = session.ranks.broadcast(lambda: _load(args, session.ranks.world))
    if args.dry_run:
        _dry_run(config, args, session)
        return
    if others := unused_gpus(session.ranks.world, session.ranks.device):
        command = f"torchrun --nproc-per-node {others + 1} -m m3ae_fast train"
        print(
            f"note: unused GPUs of this machine: {others}; to use all of them: {command} (or deepspeed "
            f"--num_gpus {others + 1} m3ae_fast/train.py) with the same options",
            flush=True,
        )
    pre_train(
        config,
        session,
        resume=args.resume,
        profile=args.profile,
        make_probe=knn_probe,
    )


def _dry_run(config: Config, args: argparse.Namespace, session: Session) -> None:
    """Print the report of --dry-run. All ranks must call this function. Raises UserError in the same cases as the
    start of a run."""
    from m3ae_fast.base.hardware import resolve_precision
    from m3ae_fast.evaluation.knn_during_training import open_probe
    from m3ae_fast.training.dry_run import report, report_time
    from m3ae_fast.training.teacher import open_teacher, with_target_width

    ranks, given = session.ranks, config
    known = args.no_data and config.model.target_width is not None  # the teacher may be on another machine
    teacher = None if known else ranks.main_first(lambda: open_teacher(given))
    config = with_target_width(given, teacher)
    gpus = args.world is not None or ranks.device.type == "cuda"
    resolved = config if gpus else config.model_copy(update={"train": resolve_precision(config.train, ranks.device)})

    def print_report() -> None:
        more = []
        if config.train.probe and not args.no_data:
            with working("opening the samples of train.probe"):
                probe = open_probe(config, progress=True)
            more = [("probe", probe.describe())] if probe else []
        world = args.world if gpus else ranks.world
        report(resolved, world, gpus=gpus, data=not args.no_data, more=more, teacher=teacher)

    ranks.on_main(print_report)
    if args.world is None and not args.no_data:
        report_time(config, session, teacher)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
sys.modules[__name__].__class__ = _Program
