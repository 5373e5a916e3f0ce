"""Encode every sample of shards, or every image of a folder, and write a table of the features.

m3ae-fast embed runs/large 'imagenet/val-*.tar' --out val.parquet
m3ae-fast embed run/export photos/ --out photos.parquet
m3ae-fast embed out/ 'shards/*.tar' --out captions.npz --modality text --set encode.pool=cls
m3ae-fast embed hog photos/ --out hog.parquet              # or timm:NAME: a public model

FILE contains these arrays or columns:
  keys      [N], keys of the samples, or paths of the images
  shards    [N], if SOURCE consists of shards
  features  float32 [N, D]
  labels    [N], if any are found; -1 or "" for a sample without a label
  patches   float16 [N, L, D], with --patches (in parquet [N, L * D]). With native aspect ratio, zeros
            follow if an image has fewer than L patches; `grids` [N, 2]: each image's rows and columns
  path, class, caption   with --columns; "" if a sample has none
"""

from __future__ import annotations

import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_local_rank, checked, program, use_device
from m3ae_fast.config.arguments import add_arguments
from m3ae_fast.embedding.embed_options import EmbedOptions
from m3ae_fast.process.launchers import is_first_rank


def main(argv: list[str] | None = None) -> int:
    parser = program("embed", __doc__)
    add_arguments(parser, EmbedOptions)
    add_local_rank(parser)
    options = checked(EmbedOptions, vars(parser.parse_args(argv)))
    use_device(options.device)
    from m3ae_fast.embedding.features import embed

    arrays = embed(**dict(options))
    if is_first_rank():
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        print(f"{options.out}: {shapes}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
