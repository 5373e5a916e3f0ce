"""m3ae-fast export MODEL --out OUT: the weights of a run as a folder that M3AE.from_pretrained(OUT) loads.

It holds model.safetensors, config.json, the tokenizer, how images are prepared, and a model card.

  --weights last     of a run with train.ema the last weights, not their moving average
  --format timm      the image encoder alone, for timm.create_model("local-dir:OUT", pretrained=True)
  --format onnx      the image encoder alone, as the files OUT, which ends in .onnx, and OUT's name with .int8.onnx
                     With --train and --val, labelled shards: the k-NN accuracy of both beside torch's, and images/s
  --push OWNER/NAME  also uploads OUT to the Hugging Face hub (log in with `hf auth login` first)
"""

from __future__ import annotations

import sys

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.cli.command_line import add_labels, output, program
from m3ae_fast.weights.exporting import export


def main(argv: list[str] | None = None) -> int:
    parser = program("export", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder (its last checkpoint is taken), checkpoint or export"
    )
    text = "a new folder, or an earlier export, which is replaced"
    parser.add_argument("--out", type=output(), required=True, metavar="OUT", help=text)
    parser.add_argument(
        "--format", choices=["m3ae", "timm", "onnx"], default="m3ae", help="whose folder OUT is (default: m3ae)"
    )
    parser.add_argument(
        "--weights", choices=["average", "last"], default="average", help="of a run with train.ema (default: average)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT to the Hugging Face hub under this name")
    parser.add_argument("--private", action="store_true", help="with --push: a model made by it is private")
    for option, what in (("--train", "to look for neighbours in"), ("--val", "to classify by them")):
        parser.add_argument(option, nargs="+", default=[], metavar="SHARDS", help=f"with --format onnx: images {what}")
    add_labels(parser)
    args = parser.parse_args(argv)
    if args.push and args.format == "onnx":
        parser.error("--push takes a folder, which --format onnx does not make")
    if args.private and not args.push:
        parser.error("--private is for --push, which makes a model on the hub")
    if (args.train or args.val) and not (args.train and args.val and args.format == "onnx"):
        parser.error("--train and --val go together, with --format onnx")
    if args.format == "onnx":
        from m3ae_fast.weights.onnx_model import NEEDS

        require_libraries(NEEDS)
    images = None
    if args.train:
        from m3ae_fast.evaluation.onnx_check import open_labelled

        images = open_labelled(args.train, args.val, args.labels)
    found = export(args.model, args.out, args.format, args.push, args.weights)
    print("\n  ".join([f"exported {found.kind} to {args.out}", *found.notes]))
    if images:
        from m3ae_fast.evaluation.onnx_check import knn_lines
        from m3ae_fast.weights.onnx_model import file_names

        print("\n  ".join(knn_lines(file_names(args.out), found.config, found.state, images)))
    if args.push:
        from m3ae_fast.base.hub import push_folder

        print(f"pushed to {push_folder(args.out, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
