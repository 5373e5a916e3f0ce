"""m3ae-fast convert SOURCE --out OUT: write the weights of a model to a folder that M3AE.from_pretrained(OUT) loads.

SOURCE is one of
  FOLDER             a run folder, a checkpoint or an export of this program, or a model that timm saved
  FILE.pkl           a checkpoint of the official JAX code, M3AE or MAE (code that it refers to is not executed)
  FILE.pth           a checkpoint of facebookresearch/mae: pre-trained, encoder only, or fine-tuned
  FILE.safetensors   weights of a timm VisionTransformer
  FILE.msgpack       the official image tokenizer, a VQGAN; set data.image_tokenizer to OUT
  OWNER/NAME         any such folder on the Hugging Face Hub

The folder contains model.safetensors, config.json, the tokenizer, the image preprocessing, and a model card. With
--format timm, it contains only the image encoder, for timm.create_model("local-dir:OUT", pretrained=True). With
--format onnx, OUT is a file that ends in .onnx, which contains only the image encoder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import program
from m3ae_fast.config.arguments import output

if TYPE_CHECKING:  # torch is imported only where it is used, so that --help appears immediately
    from m3ae_fast.model.pretrained import Pretrained


def main(argv: list[str] | None = None) -> int:
    parser = program("convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="weights: a file, a folder, or a name on the Hub")
    text = "output: a new folder or file, or an earlier export, which is replaced"
    parser.add_argument("--out", type=output(), required=True, metavar="OUT", help=text)
    parser.add_argument(
        "--format", choices=["m3ae", "timm", "onnx"], default="m3ae", help="format to write (default: m3ae)"
    )
    parser.add_argument(
        "--weights",
        choices=["average", "last"],
        default="average",
        help="for runs with train.ema: the moving average or the last weights (default: average)",
    )
    parser.add_argument(
        "--tokenizer", help="tokenizer of the captions: a tokenizer.json, a BERT vocab.txt, or a name on the Hub"
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        nargs="+",
        metavar="N",
        help="number of attention heads of the encoder, and of the decoder if there is one; required for .pth and "
        ".safetensors files if no published model has the same width",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload OUT to the Hugging Face Hub under this name (log in with `hf auth login` first)",
    )
    args = parser.parse_args(argv)
    if args.num_heads and len(args.num_heads) > 2:
        parser.error("--num-heads: specify one number, or two: encoder and decoder")
    from m3ae_fast.vqgan.model import VQGAN
    from m3ae_fast.weights.converting import convert

    heads = None if args.num_heads is None else (*args.num_heads, None)[:2]
    found = convert(
        args.source,
        args.out,
        format=args.format,
        weights=args.weights,
        tokenizer=args.tokenizer,
        num_heads=heads,
        push=args.push,
    )
    if isinstance(found, VQGAN):
        print(f"MaskGIT VQGAN with {found.config.codebook_size:,} codes, written to {args.out}")
    else:
        print(_summary(found, args.out))
    return 0


def _summary(found: Pretrained, out: Path) -> str:
    parameters = sum(tensor.numel() for tensor in found.state.values())
    what = "encoder and decoder" if found.has_decoder else "an encoder"
    lines = [f"{found.kind}: {what}, {parameters:,} weights, written to {out}", *found.notes]
    if found.config.vocab_size and found.tokenizer is None:
        lines.append("the weights contain no tokenizer: add --tokenizer to encode captions")
    return "\n  ".join(lines)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
