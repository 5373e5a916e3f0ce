"""Prediction of the masked tokens of a caption and of the missing patches of an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import ModelConfig, Range
from m3ae_fast.data.opening import load_image_tokenizer
from m3ae_fast.drawing.reconstructions import draw_reconstructions
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.vqgan.model import VQGAN
from m3ae_fast.weights.model_name import MASK, RANDOM
from m3ae_fast.weights.open_model import is_run, open_model, saved_run, set_images


class Guess(NamedTuple):
    """A predicted token for a masked position."""

    token: str
    probability: float


def fill(
    model: str,
    image: str | Path,
    text: str,
    *,
    out: str | Path | None = None,
    top: int = 5,
    visible: float = 1.0,
    seed: int = 0,
    image_range: Range | None = None,
    tokenizer: str | None = None,
    image_tokenizer: str | None = None,
) -> list[list[Guess]]:
    """Return the most probable tokens for each [MASK] in a caption, and plot the completed image if `out` is given.

    Args:
        model: name of a model; see `model_name.MODEL_HELP`.
        image: image file. A native model uses the whole image; any other model uses the central square.
        text: caption; each [MASK] stands for one token.
        out: .png file for a figure with the image, its visible patches and the completion; None: no figure.
        top: number of predicted tokens for each [MASK].
        visible: fraction of the patches that the model sees.
        seed: random seed for choosing the visible patches.
        image_range: values of black and white in images with more than 8 bits per channel; None: the values of the
            model's training data.
        tokenizer: file or name of the captions' tokenizer; None: the model's tokenizer.
        image_tokenizer: folder of the VQGAN, for a model that predicts image tokens; None: the VQGAN of the run.

    Raises:
        UserError: an argument is invalid, or the model or the image cannot be used.
    """
    if top < 1:
        raise UserError(f"--top {top}: must be 1 or more")
    if not 0 <= visible <= 1:
        raise UserError(f"--visible {visible:g}: must be from 0 to 1")
    if not out and MASK not in text:
        raise UserError(f"there is nothing to fill in: write {MASK} in the text, or complete the image with --out")
    image, path = Path(image), None if out is None else Path(out)
    if path and path.exists() and image.exists() and path.samefile(image):
        raise UserError(f"--out {path}: is the input image; choose another file")
    opened = open_model(model, text=True, tokenizer=tokenizer).eval()
    set_images(opened, {"image_range": image_range})
    vqgan = _open_image_tokenizer(model, opened.config, image_tokenizer, bool(path))
    sample = make_sample(opened, image, text, visible, seed)
    guesses = fill_text(opened, sample, top)
    if path:
        draw_reconstructions(opened, [sample], opened.tokenizer, path, vqgan)
    return guesses


def _open_image_tokenizer(name: str, model: ModelConfig, given: str | None, draws: bool) -> VQGAN | None:
    """Return the VQGAN that decodes the predicted token ids; None if the model predicts pixels, or if no figure is
    plotted (`draws` is False). `name`: name of the model; `given`: the VQGAN's folder, if the user specified it. Raises
    UserError if the VQGAN is unknown or does not fit the model."""
    if given and not (draws and model.image_targets == "vqgan"):
        raise UserError(
            f"--image-tokenizer {given}: is used only for --out with a model that predicts image tokens; leave it out"
        )
    if not draws or model.image_targets == "pixels":
        return None
    source = Path(name.removeprefix(RANDOM))
    folder = given or (saved_run(source).image_tokenizer if is_run(source) else None)
    if folder is None:
        raise UserError(
            f"--out: {name} predicts tokens of a VQGAN, which is needed to decode them; specify its folder with "
            "--image-tokenizer"
        )
    return load_image_tokenizer(folder, model, "--image-tokenizer" if given else "data.image_tokenizer")


def make_sample(model: M3AE, image: Path, text: str, visible: float, seed: int) -> Sample:
    """Return a sample of the image and the caption with their masks. See `fill` for the arguments. Raises UserError if
    the file is not an image, or if a mask is beyond the maximum length of captions."""
    try:
        sample = unmasked_sample(0, image, None, model.config, None)
    except ValueError as error:
        raise UserError(str(error)) from None
    assert sample.image_mask is not None
    sample.image_mask = draw_mask(len(sample.image_mask), 1 - visible, torch.Generator().manual_seed(seed))
    sample.tokens, sample.text_mask = _tokens(model, text)
    return sample


def _tokens(model: M3AE, text: str) -> tuple[Tensor, Tensor]:
    """Return the token ids, with 0 at masked positions, and the mask. The text segments between masks are tokenised
    separately."""
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
        raise UserError(
            f"the text has {len(ids)} tokens, but the model reads at most {length}: a {MASK} would be "
            "truncated; shorten the text"
        )
    return torch.tensor(ids[:length], dtype=torch.int64), torch.tensor(masked[:length], dtype=torch.bool)


def fill_text(model: M3AE, sample: Sample, top: int = 5) -> list[list[Guess]]:
    """Return the `top` most probable tokens for each masked token of a sample, in order."""
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
