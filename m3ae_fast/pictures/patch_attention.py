"""Draws how much a patch looks at the words of its caption, as the paper's figure 8 does.

Shapes: L patches, n text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m3ae_fast.batch.packing import Sample
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.pictures.attention import LAST, Look, attention_weights, patches_of
from m3ae_fast.pictures.figures import BLACK, Colour, box_in, levels, shown
from m3ae_fast.whole_file import whole_file

SHADE: Colour = (255, 110, 90)  # behind the word with the most attention
OUTLINE: Colour = (255, 0, 0)
_SIDE, _WIDE, _GAP, _LINE = 192, 420, 8, 20  # pixels: of an image, of a caption, between them, of a line of words


def attention_to_words(model: M3AE, sample: Sample, patch: tuple[int, int], look: Look = LAST) -> Tensor:
    """Return [n]: the part of the attention of the patch at (row, column) that goes to each token of the caption.

    What goes to cls and to patches makes their sum less than 1. `sample`: unmasked, with an image and a caption.
    """
    assert sample.image is not None
    _, columns = model.geometry.grid(sample.image)
    row = 1 + patch[0] * columns + patch[1]
    return attention_weights(model, sample, [row], look)[0, 1 + patches_of(sample) :]


def draw_patch_attention(
    model: M3AE,
    samples: Sequence[Sample],
    path: Path,
    count: int,
    patch: tuple[int, int],
    look: Look = LAST,
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG: a row for each of the first `count` samples with an image and a caption, with the patch outlined and
    each word shaded by its part of the patch's attention, from white, none, to SHADE, the caption's highest.
    `channels`: what is shown, as in `figures.levels`.

    Raises:
        UserError: no sample has both, and that patch.
    """
    assert model.tokenizer is not None
    pairs = [sample for sample in samples if _has(sample, model, patch) and sample.tokens is not None][:count]
    if not pairs:
        raise UserError(f"none of the samples has both a caption and an image with the patch {patch[0]},{patch[1]}")
    sheet = Image.new("RGB", (_SIDE + _WIDE + 3 * _GAP, _GAP + len(pairs) * (_SIDE + _GAP)), "white")
    for number, sample in enumerate(pairs):
        assert sample.image is not None and sample.tokens is not None
        top = _GAP + number * (_SIDE + _GAP)
        image = levels(sample.image, model.config, channels)
        sheet.paste(_outlined(image, patch, model.config.patch_size), (_GAP, top))
        words = [model.tokenizer.token(token) for token in sample.tokens.tolist()]
        parts = attention_to_words(model, sample, patch, look).tolist()
        _write_shaded(ImageDraw.Draw(sheet), words, parts, (_SIDE + 2 * _GAP, top))
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")


def _has(sample: Sample, model: M3AE, patch: tuple[int, int]) -> bool:
    if sample.image is None:
        return False
    rows, columns = model.geometry.grid(sample.image)
    return patch[0] < rows and patch[1] < columns


def _outlined(image: Tensor, patch: tuple[int, int], size: int) -> Image.Image:
    """Return an image, uint8 [C, H, W], with a frame around the patch of `size` pixels at (row, column)."""
    picture, (left, top, width, _) = shown(image, _SIDE), box_in(image, _SIDE)
    scale, (row, column) = width * size / image.shape[-1], patch
    box = (
        left + column * scale,
        top + row * scale,
        left + (column + 1) * scale - 1,
        top + (row + 1) * scale - 1,
    )
    ImageDraw.Draw(picture).rectangle(box, outline=OUTLINE, width=2)
    return picture


def shade(part: float, highest: float) -> Colour:
    """Return the colour behind a word: from white to SHADE, in proportion to its part of the highest."""
    fraction = part / highest if highest > 0 else 0.0
    red, green, blue = (round(255 + fraction * (end - 255)) for end in SHADE)
    return red, green, blue


def _write_shaded(
    draw: ImageDraw.ImageDraw, words: Sequence[str], parts: Sequence[float], corner: tuple[int, int]
) -> None:
    """Write words from `corner` on, each on its shade, and what the shades mean below them."""
    font, (left, y) = ImageFont.load_default(13), corner
    x, highest = float(left), max(parts, default=0.0)
    for word, part in zip(words, parts):
        text = word.removeprefix("##")  # WordPiece's mark of a piece inside a word
        width = draw.textlength(text, font=font) + 2
        x += 4 if text == word and x > left else 0
        if x + width > left + _WIDE and x > left:
            x, y = float(left), y + _LINE
        draw.rectangle((x, y, x + width, y + _LINE - 3), fill=shade(part, highest))
        draw.text((x + 1, y), text, fill=BLACK, font=font)
        x += width
    told = f"{100 * sum(parts):.3g} % of the patch's attention is on words; {100 * highest:.3g} % on the reddest"
    draw.text((left, y + _LINE + 4), told, fill=(110, 110, 110), font=ImageFont.load_default(11))
