"""Draw reconstructions of a run's samples: original, masked and reconstructed images, and captions as predicted.

python -m m3ae_fast.visualise RUN [--out FILE.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from m3ae_fast.config import Config, parse
from m3ae_fast.data import ShardStore, open_corpus, open_tokenizer
from m3ae_fast.drawing import draw_run
from m3ae_fast.engine import checkpoint
from m3ae_fast.errors import UserError, exit_cleanly


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m3ae_fast.visualise", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint is taken) or a checkpoint folder")
    parser.add_argument("--out", type=Path, help="default: RUN/reconstructions.png")
    parser.add_argument("--pictures", type=int, default=12, help="samples shown (default: 12)")
    args = parser.parse_args(argv)
    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: must be 1 or more")
    path = checkpoint.locate(Path(args.run))
    config = parse(Config, checkpoint.read_info(path).config, f"checkpoint {path}")
    weights = checkpoint.read_weights(path, average=False)  # those whose losses the run logged
    corpus = open_corpus(config.data.val or config.data.train, ShardStore(config.data.cache_dir), progress=True)
    out = args.out or Path(args.run) / "reconstructions.png"
    draw_run(config, weights, corpus, open_tokenizer(config.data, config.model), out, args.pictures)
    print(f"drew {out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
