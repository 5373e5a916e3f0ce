"""Draw figures of a run or of an exported model: reconstructions and attention.

m3ae-fast draw reconstructions runs/large                       # original, masked, reconstructed; captions
m3ae-fast draw reconstructions runs/large --ratios 0.5 0.75     # the same images at several mask ratios
m3ae-fast draw reconstructions export/ --val 'shards/val-*.tar' --out export.png
m3ae-fast draw attention runs/large --word dog                  # from the cls token and a word to the patches
m3ae-fast draw attention runs/large --patch 3,5 --layers 2,4    # from a patch to the words, in two encoder blocks
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import checked, command, program
from m3ae_fast.config.arguments import add_arguments
from m3ae_fast.drawing.options import AttentionOptions, DrawOptions, ReconstructionsOptions

_OF_A_RUN = "Samples are selected evenly from --val (default: the run's data.val or, if it is empty, its data.train)."
_COMMANDS: dict[str, tuple[type[DrawOptions], str]] = {
    "reconstructions": (ReconstructionsOptions, "samples, their masked input, and the reconstruction"),
    "attention": (AttentionOptions, "attention of words over patches, or of a patch over words"),
}


def main(argv: list[str] | None = None) -> int:
    parser = program("draw", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (options, summary) in _COMMANDS.items():
        add_arguments(command(commands, name, summary, _OF_A_RUN, partial(_draw, name, options)), options)
    given = vars(parser.parse_args(argv))
    perform = given.pop("perform")
    perform(given)
    return 0


def _draw(figure: str, options: type[DrawOptions], given: dict[str, Any]) -> None:
    chosen = checked(options, given)
    from m3ae_fast.drawing import run_figures

    print(f"drew {getattr(run_figures, figure)(**dict(chosen))}")


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
