"""Visualises encoder attention: from the cls token and from words to the image patches, and from a patch to the words
of its caption (figure 8 of the paper).

Rows of a sample: cls, its patches, its text tokens.

Shapes: L patches, n text tokens, R queries, T rows, H heads, d head dimension, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.drawing.figures import BLACK, RED, Cell, Colour, box_in, draw_sheet, levels, shown
from m3ae_fast.images.patch_grid import grid_of
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.transformer import Block

_WORDS = 7  # maximum number of words per caption
SHADE: Colour = (255, 110, 90)  # background of the token with the most attention
OUTLINE: Colour = (255, 0, 0)
# Sizes in pixels: side of an image, width of a caption, gap between them, height of a line of text.
_SIDE, _WIDE, _GAP, _LINE = 192, 420, 8, 20


LAST = -1  # the last block of the encoder


class Word(NamedTuple):
    """A word of a caption."""

    text: str
    tokens: list[int]  # indices (in the caption) of the tokens that overlap this word


@torch.no_grad()
def attention_weights(model: M3AE, sample: Sample, queries: Sequence[int], block: int = LAST) -> Tensor:
    """Return the attention weights [R, T], in the model's dtype, of the rows `queries` of an unmasked sample over all
    its rows, averaged over the heads of an encoder block. The weights of each query sum to 1. `block`: number of the
    block, from 0. Raises IndexError if the block or a row does not exist."""
    seen: list[Tensor] = []
    module = cast(Block, model.encoder.blocks[block])
    with module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model.forward_encoder(pack([sample], model.geometry))
    heads = module.attn.num_heads
    qkv = module.attn.qkv(module.norm1(seen[0]))
    q_THd, k_THd, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    scores_HRT = torch.einsum("rhd,thd->hrt", q_THd[list(queries)], k_THd) / math.sqrt(q_THd.shape[-1])
    return scores_HRT.softmax(-1).mean(0)


def patches_of(sample: Sample) -> int:
    """Return the number of patches of a sample's image."""
    return 0 if sample.image_mask is None else len(sample.image_mask)


def attention_to_patches(model: M3AE, sample: Sample, queries: Sequence[int], block: int = LAST) -> Tensor:
    """Return the attention weights [R, L] from the queries to the image patches, computed as in `attention_weights` and
    then normalised to sum to 1 over the patches."""
    weights_RL = attention_weights(model, sample, queries, block)[:, 1 : 1 + patches_of(sample)]
    return weights_RL / weights_RL.sum(1, keepdim=True)


def draw_attention(
    model: M3AE,
    samples: Sequence[Sample],
    path: Path,
    count: int,
    word: str | None = None,
    blocks: Sequence[int] = (LAST,),
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG with a row for each of the first `count` samples with an image and each of `blocks`, the numbers of
    encoder blocks from 0. Each row shows the attention of cls and of the first words (or only of cls and `word`) as an
    overlay from blue (none) to red (the highest). The attention of a word with several tokens is the mean over these
    tokens. `channels`: displayed channels, as in `figures.levels`. Raises UserError if no sample has an image, or if no
    caption contains the word."""
    rows: list[list[Cell]] = []
    for sample in samples:
        if sample.image is None or len(rows) == count * len(blocks):
            continue
        words: list[Word] = []
        if sample.tokens is not None and model.tokenizer is not None:
            words = words_of(model.tokenizer, sample.tokens.tolist(), word)
        if word is not None and not words:
            continue
        before = 1 + patches_of(sample)
        queries = [[0], *([before + token for token in word.tokens] for word in words)]
        image = levels(sample.image, model.config, channels)
        for block in blocks:
            weights_RL = attention_to_patches(model, sample, list(chain.from_iterable(queries)), block)
            parts = [part.mean(0) for part in weights_RL.split([*map(len, queries)])]
            cells = [Cell(image, f"block {block + 1}")] if len(blocks) > 1 else [Cell(image)]
            for weights_L, text in zip(parts, ["cls", *(word.text for word in words)]):
                cells.append(Cell(shade_patches(image, weights_L, model.config.patch_size), text, RED))
            rows.append(cells)
    if not rows:
        raise UserError("none of the samples has an image" + (f" and {word!r} in its caption" if word else ""))
    key = Cell(_key(rows[0][0].image), "blue: zero attention; red: maximum in image")
    draw_sheet(path, [*rows, [key]], ("image", "attention of the token"))


def words_of(tokenizer: CaptionTokenizer, tokens: Sequence[int], word: str | None) -> list[Word]:
    """Return the first words of a caption, or only `word`. `word` may consist of several words, and its case is
    ignored. Each word is returned once, at its first occurrence. Words are located in the text of the tokens, so they
    may consist of several tokens of any tokenizer."""
    pieces = tokenizer.pieces(tokens)
    text, ends = "".join(pieces), [*accumulate(map(len, pieces))]
    pattern = r"[^\W_]+"
    if word is not None:  # tokenizers differ in the spaces around punctuation
        pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", word)))
        pattern = rf"(?<!\w){pattern}(?!\w)"
    found: dict[str, Word] = {}
    for match in re.finditer(pattern, text, re.IGNORECASE):
        own = [i for i, end in enumerate(ends) if end > match.start() and end - len(pieces[i]) < match.end()]
        if not any(tokenizer.is_special(tokens[i]) for i in own):
            found.setdefault(match.group().lower(), Word(match.group(), own))
    return list(found.values())[: _WORDS if word is None else 1]


def shade_patches(image: Tensor, weights_L: Tensor, patch: int) -> Tensor:
    """Return an overlay, uint8 [3, H, W]: the mean of the image, uint8 [1 or 3, H, W], and a colour for each patch,
    from blue for the weight 0 to red for the highest weight. `patch`: patch size in pixels."""
    high = (weights_L / weights_L.max()).view(grid_of(image, patch))
    high = high.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return ((image[:3].expand(3, -1, -1) + _colours(high)) / 2).to(torch.uint8)


def _colours(high: Tensor) -> Tensor:
    """Return colours [3, H, W] from 0 to 255 for numbers [H, W] from 0 (blue) to 1 (red)."""
    return torch.stack((high, 1 - (2 * high - 1).abs(), 1 - high)) * 255


def _key(like: Tensor | None) -> Tensor:
    """Return a colour scale from left to right as an overlay on grey, uint8 [3, H, W], with the size of the image
    `like`."""
    assert like is not None
    height, width = like.shape[1:]
    return ((127 + _colours(torch.linspace(0, 1, width).expand(height, -1))) / 2).to(torch.uint8)


def attention_to_words(model: M3AE, sample: Sample, patch: tuple[int, int], block: int = LAST) -> Tensor:
    """Return the attention weights [n] of the patch at (row, column) to the tokens of the caption.

    Their sum is below 1, because cls and the patches receive attention too. `sample`: an unmasked sample with an image
    and a caption.
    """
    assert sample.image is not None
    _, columns = model.geometry.grid(sample.image)
    row = 1 + patch[0] * columns + patch[1]
    return attention_weights(model, sample, [row], block)[0, 1 + patches_of(sample) :]


def draw_patch_attention(
    model: M3AE,
    samples: Sequence[Sample],
    path: Path,
    count: int,
    patch: tuple[int, int],
    blocks: Sequence[int] = (LAST,),
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG with a row for each of the first `count` samples with an image and a caption, and each of `blocks`,
    the numbers of encoder blocks from 0. The patch is outlined, and each token of the caption is shaded by the patch's
    attention to it, from white (none) to SHADE (the highest in the caption). `channels`: displayed channels, as in
    `figures.levels`. Raises UserError if no sample has a caption and an image with this patch."""
    assert model.tokenizer is not None
    pairs = [sample for sample in samples if _has(sample, model, patch) and sample.tokens is not None][:count]
    if not pairs:
        raise UserError(f"none of the samples has both a caption and an image with the patch {patch[0]},{patch[1]}")
    rows = [(sample, block) for sample in pairs for block in blocks]
    sheet = Image.new("RGB", (_SIDE + _WIDE + 3 * _GAP, _GAP + len(rows) * (_SIDE + _GAP)), "white")
    for number, (sample, block) in enumerate(rows):
        assert sample.image is not None and sample.tokens is not None
        top = _GAP + number * (_SIDE + _GAP)
        image = levels(sample.image, model.config, channels)
        sheet.paste(_outlined(image, patch, model.config.patch_size), (_GAP, top))
        words = model.tokenizer.pieces(sample.tokens.tolist())
        parts = attention_to_words(model, sample, patch, block).tolist()
        where = f"block {block + 1}: " if len(blocks) > 1 else ""
        _write_shaded(ImageDraw.Draw(sheet), words, parts, (_SIDE + 2 * _GAP, top), where)
    with atomic_write(path) as partial:
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
    x, y = left + column * scale, top + row * scale
    ImageDraw.Draw(picture).rectangle((x, y, x + scale - 1, y + scale - 1), outline=OUTLINE, width=2)
    return picture


def shade(part: float, highest: float) -> Colour:
    """Return the background colour of a token with the attention `part`: from white for no attention to SHADE for the
    `highest` attention."""
    fraction = part / highest if highest > 0 else 0.0
    red, green, blue = (round(255 + fraction * (end - 255)) for end in SHADE)
    return red, green, blue


def _write_shaded(
    draw: ImageDraw.ImageDraw, words: Sequence[str], parts: Sequence[float], corner: tuple[int, int], where: str
) -> None:
    """Draw the pieces of a caption at `corner`, each on a background of its shade. The line below explains the shades;
    it begins with `where`."""
    font, (left, y) = ImageFont.load_default(13), corner
    x, highest = float(left), max(parts, default=0.0)
    for word, part in zip(words, parts):
        text = word.strip()
        width = draw.textlength(text, font=font) + 2
        x += 4 if text != word and x > left else 0
        if x + width > left + _WIDE and x > left:
            x, y = float(left), y + _LINE
        draw.rectangle((x, y, x + width, y + _LINE - 3), fill=shade(part, highest))
        draw.text((x + 1, y), text, fill=BLACK, font=font)
        x += width
    total, most = 100 * sum(parts), 100 * highest
    shares = f"{where}{total:.3g} % of the patch's attention goes to text tokens; {most:.3g} % to the reddest token"
    draw.text((left, y + _LINE + 4), shares, fill=(110, 110, 110), font=ImageFont.load_default(11))
