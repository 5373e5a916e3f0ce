"""m3ae-fast export MODEL --out OUT: write the weights of a model to a folder that M3AE.from_pretrained(OUT) loads.

The folder contains model.safetensors, config.json, the tokenizer, the image preprocessing, and a model card.

  --weights last     for a run with train.ema: the last weights instead of their moving average
  --format timm      only the image encoder, for timm.create_model("local-dir:OUT", pretrained=True)
  --format onnx      only the image encoder, as two files: OUT, which must end in .onnx, and a file that ends in
                     .int8.onnx. With --train and --val (labelled shards), the speed (images/s) and the k-NN accuracy
                     of both files and of the torch model are printed
  --push OWNER/NAME  also uploads OUT to the Hugging Face Hub (log in with `hf auth login` first)
"""

from __future__ import annotations

import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import add_labels, output, program


def main(argv: list[str] | None = None) -> int:
    parser = program("export", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder (its last checkpoint is used), a checkpoint or an export"
    )
    text = "output: a new folder or file, or an earlier export, which is replaced"
    parser.add_argument("--out", type=output(), required=True, metavar="OUT", help=text)
    parser.add_argument(
        "--format", choices=["m3ae", "timm", "onnx"], default="m3ae", help="format to export (default: m3ae)"
    )
    parser.add_argument(
        "--weights",
        choices=["average", "last"],
        default="average",
        help="for runs with train.ema: export the moving average or the last weights (default: average)",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT to the Hugging Face Hub under this name")
    parser.add_argument("--private", action="store_true", help="with --push: create a private repository")
    for option, what in (("--train", "training"), ("--val", "held-out")):
        text = f"with --format onnx: labelled {what} images for measuring the k-NN accuracy"
        parser.add_argument(option, nargs="+", default=[], metavar="SHARDS", help=text)
    add_labels(parser)
    args = parser.parse_args(argv)
    from m3ae_fast.evaluation.checked_export import export

    done = export(
        args.model,
        args.out,
        format=args.format,
        weights=args.weights,
        push=args.push,
        private=args.private,
        train=args.train,
        val=args.val,
        labels=args.labels,
    )
    print("\n  ".join([f"exported {done.weights.kind} to {args.out}", *done.weights.notes]))
    if done.check:
        print("\n  ".join(done.check.lines()))
    if done.address:
        print(f"uploaded to {done.address}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
