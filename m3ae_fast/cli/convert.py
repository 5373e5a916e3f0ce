"""m3ae-fast convert SOURCE --out DIR: convert weights of other programs to a folder that M3AE.from_pretrained loads.

SOURCE is one of
  FILE.pkl           a checkpoint of the official JAX code, M3AE or MAE (code that it refers to is not executed)
  FILE.pth           a checkpoint of facebookresearch/mae: pre-trained, encoder only, or fine-tuned
  FILE.safetensors   weights of a timm VisionTransformer
  FILE.msgpack       the official image tokenizer, a VQGAN; set data.image_tokenizer to DIR
  FOLDER             a run folder, a checkpoint or an export of this program, or a model that timm saved
  OWNER/NAME         any such folder on the Hugging Face Hub

A model in DIR can be loaded and fine-tuned. To continue its pre-training, set model.init_from to DIR, and set the
model sizes to the values in DIR/config.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import output, program

if TYPE_CHECKING:  # torch is imported only where it is used, so that --help appears immediately
    from m3ae_fast.model.pretrained import Pretrained


def main(argv: list[str] | None = None) -> int:
    parser = program("convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="weights: a file, a folder, or a name on the Hub")
    parser.add_argument(
        "--out", type=output(), required=True, metavar="DIR", help="output folder for weights, config and tokenizer"
    )
    parser.add_argument(
        "--tokenizer", help="tokenizer of the captions: a tokenizer.json, a BERT vocab.txt, or a name on the Hub"
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        help="number of attention heads of the encoder; required for .pth and .safetensors files if no published model "
        "has the same width",
    )
    parser.add_argument(
        "--dec-num-heads", type=int, help="number of attention heads of the decoder; required in the same cases"
    )
    args = parser.parse_args(argv)
    from m3ae_fast.vqgan.model import VQGAN
    from m3ae_fast.weights.converting import convert

    heads = {"num_heads": args.num_heads, "dec_num_heads": args.dec_num_heads}
    found = convert(args.source, args.out, tokenizer=args.tokenizer, **heads)
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
