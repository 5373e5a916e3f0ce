"""python -m m3ae_fast.export RUN OUT: the weights of a run as safetensors + config.json.

`m3ae_fast.model.M3AE.from_pretrained(OUT)` loads them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors import SafetensorError

from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.engine import checkpoint
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.model.m3ae import write_pretrained


def export(run: str | Path, out: str | Path) -> Path:
    """Write float32 weights and model config of a run (its last checkpoint) or of one checkpoint to the folder `out`.

    Whatever ZeRO stage trained it: checkpoints hold whole tensors. Returns the checkpoint that was read.

    Raises:
        UserError: there is no checkpoint, it is damaged, or `out` cannot be written.
    """
    path = checkpoint.locate(Path(run))
    info = checkpoint.read_info(path)
    config = parse(ModelConfig, info.config.get("model"), f"checkpoint {path}")
    weights = checkpoint.read_weights(path)
    try:
        write_pretrained(out, config, weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m3ae_fast.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint is taken) or a checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="folder for model.safetensors and config.json")
    args = parser.parse_args(argv)
    path = export(args.run, args.out)
    print(f"exported {path} to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
