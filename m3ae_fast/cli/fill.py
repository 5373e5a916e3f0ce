"""Fill in the masked text tokens of a caption, and the missing patches of an image.

m3ae-fast fill runs/large photo.jpg "a [MASK] on the table"
m3ae-fast fill runs/large photo.jpg "a cat on the table" --visible 0.25 --out completed.png
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.command_line import output, program, seed
from m3ae_fast.config import add_range_option
from m3ae_fast.weights.model_name import MODEL_HELP, RANDOM

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from torch import Tensor

    from m3ae_fast.batch.packing import Sample
    from m3ae_fast.config import ModelConfig
    from m3ae_fast.model.m3ae import M3AE
    from m3ae_fast.vqgan.model import VQGAN

MASK = "[MASK]"


class Guess(NamedTuple):
    """A token for a masked position."""

    token: str
    probability: float


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("fill", __doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="an image file; its central square is taken, or all")
    parser.add_argument("text", metavar="TEXT", help=f"a caption; each {MASK} stands for one token")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="guesses per mask (default: 5)")
    parser.add_argument(
        "--visible",
        type=float,
        default=1.0,
        metavar="FRACTION",
        help="fraction of the patches that are seen (default: 1)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="decides which patches are seen")
    add_range_option(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="if the model has no tokenizer, or to replace it")
    parser.add_argument(
        "--image-tokenizer",
        metavar="FOLDER",
        help="the VQGAN of a model that predicts image tokens, to draw --out (default: the run's)",
    )
    parser.add_argument(
        "--out", type=output(".png"), metavar="FILE.png", help="draw image, what was seen, and completion"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: must be 1 or more")
    if not 0 <= args.visible <= 1:
        raise UserError(f"--visible {args.visible:g}: must be from 0 to 1")
    if not args.out and MASK not in args.text:
        raise UserError(f"nothing to fill: write {MASK} in the text, or name --out for a completed image")
    if args.out and args.out.exists() and args.image.exists() and args.out.samefile(args.image):
        raise UserError(f"--out {args.out}: is the image; name another file")
    from m3ae_fast.drawing.reconstructions import draw_reconstructions
    from m3ae_fast.weights.open_model import open_model, set_images

    model = open_model(args.model, text=True, tokenizer=args.tokenizer).eval()
    set_images(model, args.range)
    vqgan = _open_image_tokenizer(args, model.config)
    sample = make_sample(model, args.image, args.text, args.visible, args.seed)
    for place, guesses in enumerate(fill_text(model, sample, args.top), 1):
        shown = "  ".join(f"{guess.token} {guess.probability:.1%}" for guess in guesses)
        print(f"{MASK} {place}: {shown}")
    if args.out:
        draw_reconstructions(model, [sample], model.tokenizer, args.out, vqgan)
        print(f"drew {args.out}")
    return 0


def _open_image_tokenizer(args: argparse.Namespace, model: ModelConfig) -> VQGAN | None:
    """Return the VQGAN that draws what the model predicts; None if that is pixels, or nothing is drawn. Raises
    UserError if it is not known, or does not fit."""
    from m3ae_fast.data.opening import load_image_tokenizer
    from m3ae_fast.weights.open_model import is_run, saved_run

    given = args.image_tokenizer
    if given and not (args.out and model.image_targets == "vqgan"):
        raise UserError(f"--image-tokenizer {given}: draws --out of a model that predicts image tokens; leave it out")
    if not args.out or model.image_targets == "pixels":
        return None
    source = Path(args.model.removeprefix(RANDOM))
    folder = given or (saved_run(source).image_tokenizer if is_run(source) else None)
    if folder is None:
        raise UserError(
            f"--out: {args.model} predicts tokens of a VQGAN, which draws them; name its folder with --image-tokenizer"
        )
    return load_image_tokenizer(folder, model, "--image-tokenizer" if given else "data.image_tokenizer")


def make_sample(model: M3AE, image: Path, text: str, visible: float, seed: int) -> Sample:
    """Return an image file and a caption, with masks, as the model takes them. Raises UserError where the file is no
    image, or the caption is too long for one of its masks."""
    import torch

    from m3ae_fast.batch.inputs import unmasked_sample
    from m3ae_fast.batch.masking import draw_mask

    try:
        sample = unmasked_sample(0, image, None, model.config, None)
    except ValueError as error:
        raise UserError(str(error)) from None
    assert sample.image_mask is not None
    sample.image_mask = draw_mask(len(sample.image_mask), 1 - visible, torch.Generator().manual_seed(seed))
    sample.tokens, sample.text_mask = _tokens(model, text)
    return sample


def _tokens(model: M3AE, text: str) -> tuple[Tensor, Tensor]:
    """Return token ids, 0 where one is masked, and the mask. Parts between masks are tokenized alone."""
    import torch

    from m3ae_fast.base.bad_samples import BadSample

    assert model.tokenizer is not None
    ids: list[int] = []
    masked: list[bool] = []
    for number, part in enumerate(text.split(MASK)):
        try:
            own = model.tokenizer.encode(part).tolist()
        except BadSample as error:
            raise UserError(f"{part!r}: {error}") from None
        ids += ([0] if number else []) + own
        masked += ([True] if number else []) + [False] * len(own)
    length = model.config.text_length
    if any(masked[length:]):
        raise UserError(f"the text has {len(ids)} tokens, and the model takes {length}: a {MASK} would be cut off")
    return torch.tensor(ids[:length], dtype=torch.int64), torch.tensor(masked[:length], dtype=torch.bool)


def fill_text(model: M3AE, sample: Sample, top: int = 5) -> list[list[Guess]]:
    """Return, for each masked token of a `make_sample` in order, the `top` likeliest tokens."""
    from m3ae_fast.batch.packing import pack

    assert sample.text_mask is not None and model.tokenizer is not None
    geometry = replace(model.geometry, image_all_tokens=False, text_all_tokens=False)
    device = model.encoder_input.cls_token.device
    _, logits_WV = model.predict(pack([sample], geometry).to(device))
    assert logits_WV is not None
    best = logits_WV.float().softmax(-1).topk(min(top, logits_WV.shape[1]), dim=-1)
    return [
        [Guess(model.tokenizer.token(token), probability) for token, probability in zip(tokens, probabilities)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist())
    ]


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
