"""Pre-train an M3AE.

deepspeed m3ae_fast/train.py --config configs/quickstart.json
deepspeed --num_gpus 8 m3ae_fast/train.py --config configs/large.json --set optim.peak_lr=3e-4
torchrun --nproc-per-node 2 m3ae_fast/train.py --config configs/quickstart.json
python m3ae_fast/train.py --config configs/large.json --dry-run
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial

# Threads that wait must not keep a core from the loader or another rank; OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from m3ae_fast.config import Config, load_config
from m3ae_fast.dry_run import report
from m3ae_fast.engine.failures import explain
from m3ae_fast.engine.feed import feed
from m3ae_fast.engine.profiler import TRACE_FILE, profiler
from m3ae_fast.engine.ranks import Ranks, join_ranks
from m3ae_fast.engine.run import Run
from m3ae_fast.engine.run_folder import RunFolder
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.errors import exit_cleanly
from m3ae_fast.hardware import settle_precision
from m3ae_fast.transfer.curve import TransferCurve


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a JSON config, such as configs/quickstart.json"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field: --set train.epochs=20"
    )
    parser.add_argument(
        "--resume",
        default="no",
        metavar="auto|no|PATH",
        help="auto: go on from the last checkpoint in run.dir, or start; no (default): start a new run; "
        "PATH: go on from that checkpoint or run folder",
    )
    parser.add_argument(
        "--profile", action="store_true", help=f"write {TRACE_FILE} into run.dir: a torch profiler trace of some steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the config, print sizes and memory, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with join_ranks() as ranks:
        try:
            config = ranks.told(lambda: load_config(args.config, args.set))
            if args.dry_run:
                ranks.on_main(lambda: report(config))
                return 0
            settled = ranks.told(lambda: settle_precision(config.train, ranks.device))
            config = config.model_copy(update={"train": settled})
            return train(config, args.resume, ranks, args.profile)
        except Exception as error:
            told = explain(error)
            if told is None:
                raise
            if ranks.says("error"):  # once, by the first rank that comes here
                raise told from None
            raise SystemExit(2) from None


def train(config: Config, resume: str, ranks: Ranks, profile: bool = False) -> int:
    """Train to the end, or until somebody asks to stop. Returns the exit code."""
    stop = StopRequest()
    with ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        run = Run.set_up(config, resume, ranks, folder)
        curve = TransferCurve.of(run)
        stop.listen()
        trace_dir = config.run.dir if profile and ranks.is_main else None
        with run.log or nullcontext(), profiler(trace_dir) as trace:
            run.announce()
            if run.step == 0:
                run.evaluate()
                if curve:
                    curve.log(run)
            for fed in feed(run.train_loader, run.share.accumulation, ranks.device, partial(run.begin_agreement, stop)):
                counts = run.agree(fed)
                if counts is None:
                    break
                losses, grad_norm = run.take_step(fed, counts)
                run.log_step(losses, grad_norm)
                run.evaluate()
                if curve:
                    curve.log(run)
                run.save_if_due()
                if trace:
                    trace.step()
            run.finish(stop)
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
