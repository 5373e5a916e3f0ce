"""m3ae-fast verify FILE.npz ...: compare this implementation with the official M3AE.

The command rebuilds the model of each golden file, loads its parameters, and compares every number that the official
implementation computed. Files of pre-training contain outputs, losses, gradients, features, and some AdamW steps. Files
of a linear probe or of fine-tuning contain logits, gradients, losses, learning rates, and parameters after some steps.
Files of the image tokenizer contain features, ids, and decoded images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_device, program


def main(argv: Sequence[str] | None = None) -> int:
    parser = program("verify", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="golden files of the official implementation")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="dtype of the computations"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    from m3ae_fast.verify.replay import compare

    return compare(args)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
