"""Pre-train a model with one command: make shards, choose settings, train, evaluate and export.

m3ae-fast pretrain photos/ --out run        # captions: NAME.txt beside NAME.jpg; sub-folders: classes
m3ae-fast pretrain photos/ --out run --captions table.csv --labels json.category   # columns of a table
m3ae-fast pretrain 'shards/*.tar' --out run --hours 8
m3ae-fast pretrain uoft-cs/cifar10 --out run                # a dataset on the Hugging Face Hub
m3ae-fast pretrain photos/ --out run --from runs/base       # continue from existing weights
m3ae-fast pretrain photos/ --out run --dry-run              # print the settings and the duration

The settings are printed and written to OUT/config.json, for `m3ae-fast train --config`. If the command
is interrupted, run it again to resume. In Python: m3ae_fast.pretrain("photos/", out="run").
"""

from __future__ import annotations

import signal
import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_local_rank, checked, program, refuse, use_device
from m3ae_fast.config.arguments import add_arguments
from m3ae_fast.pretraining import RESUME_NOTE, SEVERAL_RANKS
from m3ae_fast.pretraining.options import PretrainOptions
from m3ae_fast.process.launchers import alone


def parse_args(argv: list[str] | None) -> PretrainOptions:
    parser = program("pretrain", __doc__)
    add_arguments(parser, PretrainOptions)
    add_local_rank(parser)
    return checked(PretrainOptions, vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    if not alone():
        refuse(SEVERAL_RANKS)
    try:
        finished = _pretrain(options)
    except KeyboardInterrupt:
        print(f"stopped; {RESUME_NOTE}", file=sys.stderr)
        return 130
    if not (finished or options.dry_run):
        print(f"stopped; {RESUME_NOTE}")
    return 0


def _pretrain(options: PretrainOptions) -> bool:
    """Pre-train, and return whether the run is finished."""
    use_device(options.device)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # libraries handle SIGINT poorly while they are imported
    from m3ae_fast.pretraining.stages import pretrain

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return pretrain(**dict(options)).finished


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
