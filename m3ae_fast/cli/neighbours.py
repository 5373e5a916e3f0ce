"""Find the images of a folder that are most similar to an image, by the features of a model.

m3ae-fast neighbours run/export photos/cat.jpg photos/ --out neighbours.png

Each line of the output has a cosine similarity and a path, the most similar image first. All images of the folder are
encoded in each call. If there are many, write their features once with the command embed, and search them in Python.
"""

from __future__ import annotations

import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import checked, program, use_device
from m3ae_fast.config.arguments import add_arguments
from m3ae_fast.embedding.neighbours_options import NeighboursOptions


def main(argv: list[str] | None = None) -> int:
    parser = program("neighbours", __doc__)
    add_arguments(parser, NeighboursOptions)
    options = checked(NeighboursOptions, vars(parser.parse_args(argv)))
    use_device(options.device)
    from m3ae_fast.embedding.nearest_images import neighbours

    for path, similarity in neighbours(**dict(options)):
        print(f"{similarity:.3f}  {path}")
    if options.out is not None:
        print(f"drew {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
