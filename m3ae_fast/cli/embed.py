"""Encode every sample of shards, or every image of a folder, without masking, and write a table of the features.

m3ae-fast embed runs/large 'imagenet/val-*.tar' --out val.parquet
m3ae-fast embed runs/large photos/ --out photos.parquet
m3ae-fast embed out/ 'shards/*.tar' --out captions.npz --modality text --pool cls

FILE contains these arrays or columns:
  keys      [N], keys of the samples, or paths of the images
  shards    [N], if SOURCE consists of shards
  features  float32 [N, D]
  labels    [N], if any are found; -1 or "" for a sample without a label
  patches   float16 [N, L, D], with --patches (in parquet [N, L * D]). With native aspect ratio, the features of images
            with fewer than L patches end with zeros, and `grids` [N, 2] contains the numbers of patch rows and columns
  path, class, caption   with --columns: the fields path and class of a sample's json, which `shards make` writes, and
            the sample's caption; "" if a sample has no such field or no caption
"""

from __future__ import annotations

import argparse
import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import (
    add_labels,
    add_settings,
    names_of,
    program,
    use_device,
)
from m3ae_fast.config.arguments import output
from m3ae_fast.config.poolings import POOLS, described
from m3ae_fast.evaluation.tasks import COLUMN_NAMES, MODALITIES
from m3ae_fast.process.launchers import is_first_rank
from m3ae_fast.weights.model_name import MODEL_HELP


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("embed", __doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="shards (paths, brace patterns, globs, URLs), a folder of images, or image files",
    )
    parser.add_argument(
        "--out", type=output(".parquet", ".npz"), required=True, metavar="FILE", help="output file, .parquet or .npz"
    )
    parser.add_argument("--pool", choices=POOLS, help=f"pooling (default: mean): {described()}")
    add_labels(parser)
    parser.add_argument(
        "--modality",
        choices=MODALITIES,
        default="image",
        help="input of the encoder (default: image)",
    )
    parser.add_argument(
        "--patches", action="store_true", help="also write the features of all patches, which makes the file large"
    )
    parser.add_argument(
        "--columns",
        type=names_of("column", COLUMN_NAMES),
        default=[],
        metavar="NAME,NAME",
        help=f"further columns to write for each sample: {', '.join(COLUMN_NAMES)}",
    )
    add_settings(parser, "encode.batch=256")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    use_device(args.device)
    from m3ae_fast.evaluation.embedding import embed

    arrays = embed(
        args.model,
        args.source,
        out=args.out,
        modality=args.modality,
        pool=args.pool,
        labels=args.labels,
        patches=args.patches,
        columns=args.columns,
        device=args.device,
        overrides=args.set,
    )
    if is_first_rank():
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        print(f"{args.out}: {shapes}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
