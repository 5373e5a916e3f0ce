"""Tools for shards: make them, look into them, train a tokenizer on them.

python -m m3ae_fast.data from-folder images/ shards/ --held-out 0.05
python -m m3ae_fast.data from-hdf5 cc12m.hdf5 shards/
python -m m3ae_fast.data from-hf uoft-cs/cifar10 shards/
python -m m3ae_fast.data index 'shards/*.tar'
python -m m3ae_fast.data stats 'shards/*.tar' --write configs/mine.json
python -m m3ae_fast.data manifest 's3://bucket/{00000..01242}.tar' --out cc12m.npy
python -m m3ae_fast.data train-tokenizer 'shards/train-*.tar' --vocab-size 4096 --out tokenizer.json
python -m m3ae_fast.data tokenize-images 'shards/train-*.tar' --vqgan vqgan/ --out ids/train --views 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from m3ae_fast.command_line import program
from m3ae_fast.errors import exit_cleanly
from m3ae_fast.shard_tools.commands import add_commands


def main(argv: Sequence[str] | None = None) -> int:
    parser = program("data", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands (each has its own --help)")
    add_commands(commands)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
