"""Pre-train an M3AE.

deepspeed m3ae_fast/train.py --config configs/quickstart.json
deepspeed --num_gpus 8 m3ae_fast/train.py --config configs/large.json --set optim.peak_lr=3e-4
torchrun --nproc-per-node 2 m3ae_fast/train.py --config configs/quickstart.json
python m3ae_fast/train.py --config configs/large.json --dry-run
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3ae_fast.stop_signals import SIGNALS

if __name__ == "__main__":  # torch takes seconds to import; `StopRequest` handles what arrived meanwhile
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

from m3ae_fast.command_line import add_resume, add_settings, program
from m3ae_fast.config import Config, load_config
from m3ae_fast.errors import exit_cleanly
from m3ae_fast.process.launchers import alone

if TYPE_CHECKING:  # torch is imported by what needs it: not by --help, nor by what only says that the config is wrong
    from m3ae_fast.process.program import Session
    from m3ae_fast.run.loop import Loop


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("train", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a JSON config, such as configs/quickstart.json"
    )
    add_settings(parser, "train.epochs=20")
    add_resume(parser, "run.dir")
    parser.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="continue although shards, tokenizer, crops or masks are not the checkpoint's: it will be another run",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write trace.json.gz into run.dir: a torch profiler trace of some steps"
    )
    dry = parser.add_argument_group("looking at a config without training")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, shards and tokenizer, print sizes, memory, communication and, measured by a few steps, how "
        "long the run takes on this machine; then exit",
    )
    dry.add_argument(
        "--world", type=int, metavar="N", help="for N GPUs elsewhere (default: as many as need no accumulation)"
    )
    dry.add_argument(
        "--sizes",
        type=Path,
        metavar="FILE",
        help="sizes of native images, as python -m m3ae_fast.data stats wrote them",
    )
    dry.add_argument("--no-data", action="store_true", help="leave out shards and tokenizer, which lie elsewhere")
    args = parser.parse_args(argv)
    if (args.world is not None or args.no_data or args.sizes) and not args.dry_run:
        parser.error("--world, --sizes and --no-data go with --dry-run")
    if args.world is not None and args.world < 1:
        parser.error(f"--world {args.world}: must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if alone():
        load_config(args.config, args.set)  # a mistake is told before the imports, which take seconds
    from m3ae_fast.process.program import joined_program

    with joined_program() as session:
        perform(args, session)
    return 0  # also where a rank was asked to stop


def perform(args: argparse.Namespace, session: Session) -> None:
    """Do what the command line asks for. Raises UserError where that is not possible."""
    from m3ae_fast.dry_run import report, report_time
    from m3ae_fast.hardware import settle_precision

    ranks = session.ranks
    config = ranks.broadcast(lambda: load_config(args.config, args.set))
    if args.dry_run:
        ranks.on_main(lambda: report(config, args.world, data=not args.no_data, sizes=args.sizes))
        if args.world is None and not args.no_data:
            report_time(config, session)
        return
    settled = ranks.broadcast(lambda: settle_precision(config.train, ranks.device))
    pre_train(config.model_copy(update={"train": settled}), args, session)


def pre_train(config: Config, args: argparse.Namespace, session: Session) -> None:
    """Open the data, build or restore the model, and train it."""
    from m3ae_fast.run.run import Run
    from m3ae_fast.run.run_folder import RunFolder
    from m3ae_fast.transfer.curve import knn_probe

    session.pulse.watch_over(config.run)
    with session.ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        run = Run.set_up(config, args.resume, session, folder, args.resume_with_changes)
        run.probe = knn_probe(run)
        train(run, config.run.dir if args.profile and session.ranks.is_main else None)


def train(loop: Loop, trace_dir: Path | None = None) -> dict[str, Any] | None:
    """Take a run's steps, to the last or until a rank is asked to stop: of pre-training, a linear probe or fine-tuning.

    Args:
        loop: ready for its first step. Every rank has one.
        trace_dir: where to write a profiler trace of some steps; None: nowhere.

    Returns:
        The result of a run that has taken its last step, else None.

    Raises:
        UserError: a loss is not finite, too many samples cannot be used, or a checkpoint cannot be written.
    """
    from m3ae_fast.process.garbage import GarbageCollection
    from m3ae_fast.run.profiler import profiler

    loop.stop.listen()
    with loop.ending(), loop.log, loop.saving, profiler(trace_dir) as trace, GarbageCollection() as garbage:
        loop.announce()
        loop.evaluate_if_due()
        for inputs in loop.inputs():  # micro-batches on the device; the next ones are loaded meanwhile
            counts = loop.step_counts(inputs)  # over all ranks: what the losses are means over
            if counts is None:  # a rank is asked to stop, or has failed
                break
            losses, grad_norm = loop.take_step(inputs, counts)  # forward, backward, update
            loop.log_step(losses, grad_norm)
            loop.evaluate_if_due()
            loop.save_if_due()
            garbage.after_step(loop.step)
            if trace:
                trace.step()
        loop.finish()
        return loop.conclude() if loop.step >= loop.schedule.total_steps else None


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
