"""m3ae-fast verify FILE.npz ...: does this model compute what the official M3AE does?

Rebuilds the model of each golden file, loads its parameters, and compares every number that the official
implementation computed. Files of pre-training hold outputs, losses, gradients, features, and some AdamW steps; files of
a linear probe or of fine-tuning hold logits, gradients, losses, learning rates, and parameters after some steps; files
of the image tokenizer hold features, ids, and decoded images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import program


def main(argv: Sequence[str] | None = None) -> int:
    parser = program("verify", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="golden files of the official implementation")
    parser.add_argument("--tolerance-scale", type=float, default=1.0, help="widen every tolerance by this factor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    args = parser.parse_args(argv)
    from m3ae_fast.verify.replay import compare

    return compare(args)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
