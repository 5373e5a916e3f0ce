"""Figures of reconstructions: original, masked and predicted images and captions.

Shapes: L patches, K = P * P * C values of a patch, I masked patches, W masked text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import Config, ModelConfig
from m3ae_fast.data import Corpus, Preparation, eval_samples, open_image_tokenizer
from m3ae_fast.drawing.figures import BLACK, GREEN, RED, Colour, levels, shown, stretched
from m3ae_fast.drawing.gradient_glyphs import glyphs
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.images.patch_grid import Grid, patch_rows
from m3ae_fast.model.image_targets import Hog, TeacherFeatures
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import load_weights
from m3ae_fast.model.transformer import whole_depth
from m3ae_fast.vqgan.model import VQGAN

SIDE = 160  # side of a displayed image in pixels
TEXT_WIDTH = 440
TALLEST = 2000  # maximum height of a row in pixels, for long captions
GAP = 8
GREY = 127
HIDDEN = "___"
FAINT = (130, 130, 130)
_LINE = 16  # height of a line of text in pixels
# lines below figures of models with loss.norm_pix
GIVEN_AWAY = (
    "The model does not predict the mean and the contrast of a masked patch (loss.norm_pix), so the figure takes them "
    "from the original.",
    'The column "zero prediction" shows what this alone contributes.',
)


class _Row(NamedTuple):
    """A sample in a figure, and the errors of its masked pixels. Without loss.norm_pix, the errors are 0."""

    picture: Image.Image
    error: float = 0.0  # sum of the squared errors of the reconstruction, in levels from 0 to 255
    zero_error: float = 0.0  # sum of the squared errors of the zero prediction, in the same units


def open_weights(config: Config, weights: dict[str, Tensor], source: str = "the run's weights") -> M3AE:
    """Return the model of a run on the CPU. `weights`: float32 tensors by parameter name, which become the model's
    parameters; `source`: their name in errors. Raises UserError if they do not fit the config."""
    with torch.device("meta"):  # initialising weights would use the random generator of the ongoing training
        model = M3AE(config.model, config.loss)
    load_weights(model, weights, source, assign=True)
    return model


def can_draw(config: ModelConfig) -> bool:
    """Return whether any predictions of a model can be drawn: captions, and all targets of images except features of a
    teacher."""
    return config.image_targets != "features" or config.vocab_size > 0


def draw_run(
    config: Config,
    weights: dict[str, Tensor],
    corpus: Corpus,
    tokenizer: CaptionTokenizer | None,
    path: Path,
    count: int,
    ratios: Sequence[float] = (),
    source: str = "the run's weights",
) -> int:
    """Plot reconstructions of `count` evenly spaced samples of `corpus`, as in `draw_reconstructions`. They are
    computed on the CPU from a run's weights. `ratios`: mask ratios of the image; every sample is reconstructed with
    each of them. If `ratios` is empty, the ratio of the run is used. `source`: the name of the weights in errors.

    Returns:
        The number of plotted rows. If no sample is valid, it is 0, and no PNG is written.
    """
    model = open_weights(config, weights, source)
    by_ratio = []
    for ratio in ratios or [config.masking.image_ratio]:
        masking = config.masking.model_copy(update={"image_ratio": ratio})
        preparation = Preparation(model.geometry, masking, tokenizer, config.run.seed)
        by_ratio.append(eval_samples(corpus, preparation, count))
    samples = [sample for same in zip(*by_ratio) for sample in same]
    if samples:
        vqgan = open_image_tokenizer(config.data, config.model)
        draw_reconstructions(model, samples, tokenizer, path, vqgan, config.data.show_channels)
    return len(samples)


@torch.no_grad()
def draw_reconstructions(
    model: M3AE,
    samples: Sequence[Sample],
    tokenizer: CaptionTokenizer | None,
    path: Path,
    vqgan: VQGAN | None = None,
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG with a row for each sample. Visible patches and text tokens are shown unchanged, and masked ones are
    shown as predicted. If the image targets are ids of `vqgan`, the whole image is decoded from the true and the
    predicted ids. For HOG targets, their true and predicted values are drawn as lines (see `gradient_glyphs`), and
    visible patches have their true values. Predicted features of a teacher are not drawn. If the model has
    loss.norm_pix, a column shows the zero prediction (see `views_of`), and a line below the figure states the error of
    the reconstructions as a multiple of the error of the zero prediction.

    Args:
        model: model on any device, in any mode.
        samples: samples with masks and images [C, H, W].
        tokenizer: tokenizer of the captions; None: tokens are shown as ids.
        vqgan: the frozen image tokenizer, on the CPU; None if the targets are not its ids.
        channels: displayed channels, as in `figures.levels`.
    """
    with whole_depth():
        rows = [_row(model, sample, tokenizer, vqgan, channels) for sample in samples]
    titles = _titles(model)
    left = len(titles) * (SIDE + GAP)
    notes = _notes(rows) if model.loss_config.norm_pix else []
    height = 24 + sum(row.picture.height + GAP for row in rows) + len(notes) * _LINE
    sheet = Image.new("RGB", (left + TEXT_WIDTH, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, title in enumerate([*titles, "caption; predicted tokens: green if correct, otherwise red"]):
        draw.text((GAP + i * (SIDE + GAP), 5), title, fill=FAINT, font=font)
    y = 24
    for row in rows:
        sheet.paste(row.picture, (0, y))
        y += row.picture.height + GAP
    for note in notes:
        draw.text((GAP, y), note, fill=FAINT, font=font)
        y += _LINE
    with atomic_write(path) as partial:
        sheet.save(partial, format="PNG")


def _notes(rows: Sequence[_Row]) -> list[str]:
    """Return the lines below a figure of a model with loss.norm_pix."""
    error, zero_error = (sum(values) for values in zip(*((row.error, row.zero_error) for row in rows)))
    if not zero_error:  # there are no images
        return []
    return [
        *GIVEN_AWAY,
        f"Squared error of the reconstructions: {error / zero_error:.2f} times that of the zero prediction.",
    ]


def _row(
    model: M3AE, sample: Sample, tokenizer: CaptionTokenizer | None, vqgan: VQGAN | None, channels: Sequence[int] | None
) -> _Row:
    device, norm_pix = next(model.parameters()).device, model.loss_config.norm_pix
    output_IK, logits_WV = model.predict(pack([sample], model.geometry).to(device))
    left = len(_titles(model)) * (SIDE + GAP)
    row = Image.new("RGB", (left + TEXT_WIDTH, TALLEST), "white")
    height, errors = SIDE, [0.0, 0.0]
    if sample.image is not None and sample.image_mask is not None:
        output_IK = output_IK.float().cpu()
        pixels = model.config.image_targets == "pixels"
        images = views_of(model, sample.image, sample.image_mask, output_IK if pixels else None)
        if vqgan:
            images.append(decode_predicted(model, vqgan, sample.image, sample.image_mask, output_IK))
        pictures = [shown(levels(image, model.config, channels), SIDE) for image in images]
        if isinstance(model.image_targets, Hog):
            pictures += _hog_pictures(model, model.image_targets, sample.image, sample.image_mask, output_IK)
        for i, picture in enumerate(pictures):
            row.paste(picture, (GAP + i * (SIDE + GAP), 0))
        if norm_pix:  # visible patches are unchanged, so that only masked ones differ
            original, _, *predicted = (image.float() for image in images)
            errors = [(each - original).square().sum().item() for each in predicted]
    if sample.tokens is not None and sample.text_mask is not None and logits_WV is not None:
        with_loss = _with_loss(sample.text_mask, model.loss_config.text_all_tokens)
        guesses = dict(zip(with_loss.nonzero()[:, 0].tolist(), logits_WV.argmax(-1).tolist()))
        views = caption_views(sample.tokens, sample.text_mask, guesses, tokenizer)
        height = min(max(_write_captions(ImageDraw.Draw(row), views, left + GAP), SIDE), TALLEST)
    return _Row(row.crop((0, 0, row.width, height)), *errors)


def _titles(model: M3AE) -> list[str]:
    """Return the headings of the columns with images."""
    if isinstance(model.image_targets, Hog):
        return ["original", "masked", "gradients", "predicted gradients"]
    if isinstance(model.image_targets, TeacherFeatures):
        return ["original", "masked"]
    return ["original", "masked", "reconstruction"] + ["zero prediction"] * model.loss_config.norm_pix


def _hog_pictures(model: M3AE, hog: Hog, image: Tensor, mask_L: Tensor, output_IK: Tensor) -> list[Image.Image]:
    """Return pictures of the true targets, and of the targets with the predictions at the masked patches."""
    true_LK = hog.of_patches(image[None], torch.arange(len(mask_L)))
    predicted_LK = true_LK.clone()
    predicted_LK[_with_loss(mask_L, model.loss_config.image_all_tokens)] = output_IK
    predicted_LK[~mask_L] = true_LK[~mask_L]
    return [glyphs(each, model.geometry.grid(image), SIDE) for each in (true_LK, predicted_LK)]


def decode_predicted(model: M3AE, vqgan: VQGAN, image: Tensor, mask_L: Tensor, logits_IK: Tensor) -> Tensor:
    """Return the image, uint8 [C, H, W], decoded from the true ids of visible patches and the predicted ids of masked
    patches. `image`: the original, uint8 [C, H, W]; `logits_IK`: predicted logits over the codebook, for all patches if
    the model has loss.image_all_tokens."""
    ids_L, predicted_L = vqgan.encode(image[None])[0], torch.zeros(len(mask_L), dtype=torch.int32)
    predicted_L[_with_loss(mask_L, model.loss_config.image_all_tokens)] = logits_IK.argmax(-1).to(torch.int32)
    grid = model.geometry.grid(image)
    decoded = vqgan.decode(torch.where(mask_L, predicted_L, ids_L).view(1, *grid))[0]
    return (decoded.clamp(0, 1) * 255).round().to(torch.uint8)


def views_of(model: M3AE, image: Tensor, mask_L: Tensor, pixels_IK: Tensor | None) -> list[Tensor]:
    """Return the original image, the masked image and, if pixels are predicted, the reconstruction, each uint8 [C, H,
    W]. `image`: the model's input [C, H, W]; `pixels_IK`: predicted values, float32, for all patches if the model has
    loss.image_all_tokens.

    With loss.norm_pix, predictions are standardised per patch. As in MAE, this is undone with the mean and the standard
    deviation of the true patch, which the model does not predict. A fourth image therefore shows the zero prediction:
    the reconstruction of a model that predicts 0 for every value.
    """
    c, with_loss = model.config, _with_loss(mask_L, model.loss_config.image_all_tokens)
    patches_LK = _cut(levels(image, c, range(len(image))), c.patch_size).float()
    masked = patches_LK.clone()
    masked[mask_L] = GREY
    views = [patches_LK, masked]
    predictions = [] if pixels_IK is None else [pixels_IK]
    if pixels_IK is not None and model.loss_config.norm_pix:
        normal_IK = _cut(normalised(image, c.image_mean, c.image_std), c.patch_size)[with_loss]
        spread_I1 = (normal_IK.var(-1, keepdim=True) + 1e-6).sqrt()
        predictions = [each * spread_I1 + normal_IK.mean(-1, keepdim=True) for each in (pixels_IK, 0 * pixels_IK)]
    mean, std = (torch.tensor(v).repeat(c.patch_size**2) for v in (c.image_mean, c.image_std))
    for predicted_IK in predictions:
        view = patches_LK.clone()
        is_uint8 = image.dtype == torch.uint8
        view[with_loss] = (predicted_IK * std + mean) * 255 if is_uint8 else stretched(predicted_IK).float()
        views.append(torch.where(mask_L[:, None], view, patches_LK))
    grid = model.geometry.grid(image)
    return [_join(view.clamp(0, 255).round().to(torch.uint8), grid, c.patch_size) for view in views]


def _with_loss(mask: Tensor, everywhere: bool) -> Tensor:
    return torch.ones_like(mask) if everywhere else mask


def _cut(image: Tensor, patch: int) -> Tensor:
    """Split an image [C, H, W] into patches [L, P * P * C]."""
    return patch_rows([image], patch).permute(0, 2, 3, 1).flatten(1)


def _join(patches_LK: Tensor, grid: Grid, patch: int) -> Tensor:
    """Join patches [L, P * P * C] into an image [C, H, W]."""
    rows, columns = grid
    blocks = patches_LK.reshape(rows, columns, patch, patch, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(blocks.shape[-1], rows * patch, columns * patch)


def caption_views(
    tokens: Tensor, mask: Tensor, guesses: dict[int, int], tokenizer: CaptionTokenizer | None
) -> dict[str, list[tuple[str, Colour]]]:
    """Return three views of a caption, by name: "caption" (the original), "masked", and "predicted", with the `guesses`
    (token ids by position) at the masked positions. `tokens`: int [n]; `mask`: bool [n], True for masked tokens. Each
    view is a list of pieces of text with their colours; a piece includes the space before a word. Without a tokenizer,
    tokens are shown as ids."""

    def pieces(ids: Sequence[int]) -> list[str]:
        return tokenizer.pieces(ids) if tokenizer else [f" {each}" for each in ids]

    own, masked = tokens.tolist(), mask.tolist()
    predicted = [guesses[i] if hidden else token for i, (token, hidden) in enumerate(zip(own, masked))]
    colours = [BLACK if not hidden else GREEN if a == b else RED for a, b, hidden in zip(own, predicted, masked)]
    return {
        "caption": [(piece, BLACK) for piece in pieces(own)],
        "masked": [(f" {HIDDEN}", FAINT) if hidden else (piece, BLACK) for piece, hidden in zip(pieces(own), masked)],
        "predicted": [*zip(pieces(predicted), colours)],
    }


def _write_captions(draw: ImageDraw.ImageDraw, lines: dict[str, list[tuple[str, Colour]]], left: int) -> int:
    """Draw the captions, each wrapped over as many lines as necessary, and return their height in pixels. `left`: left
    edge in pixels."""
    y = 0
    font = ImageFont.load_default(13)
    for title, words in lines.items():
        draw.text((left, y), title, fill=FAINT, font=ImageFont.load_default(11))
        x = indent = 64.0
        for piece, colour in words:
            word = piece.strip()
            space = draw.textlength(" ", font=font) if word != piece and x > indent else 0
            width = draw.textlength(word, font=font)
            if x + space + width > TEXT_WIDTH and x > indent:
                x, y, space = indent, y + _LINE, 0
            draw.text((left + x + space, y), word, fill=colour, font=font)
            x += space + width
        y += 22
    return y
