"""Draws where the encoder looks: attention of cls and of words over the patches of their image, as the paper does.

Rows of a sample: cls, its patches, its text tokens.

Shapes: L patches, n text tokens, R queries, T rows, H heads, d values a head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from m3ae_fast.batch.grids import grid_of
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.transformer import Block
from m3ae_fast.pictures.figures import RED, Cell, draw_sheet, levels

_WORDS = 7  # at most, of one caption


class Look(NamedTuple):
    """Whose attention it is."""

    block: int = -1  # of the encoder, from 0; -1: the last
    head: int | None = None  # from 0; None: the mean over all


LAST = Look()


@torch.no_grad()
def attention_weights(model: M3AE, sample: Sample, queries: Sequence[int], look: Look = LAST) -> Tensor:
    """Return weights [R, T] of the rows `queries` of an unmasked sample over all its rows; each query's sum to 1."""
    seen: list[Tensor] = []
    block = cast(Block, model.encoder.blocks[look.block])
    with block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model.forward_encoder(pack([sample], model.geometry))
    heads = block.attn.num_heads
    _, qkv = block.attn.qkv(block.norm1(seen[0]))
    q_THd, k_THd, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    scores_HRT = torch.einsum("rhd,thd->hrt", q_THd[list(queries)], k_THd) / math.sqrt(q_THd.shape[-1])
    weights_HRT = scores_HRT.softmax(-1)
    return weights_HRT.mean(0) if look.head is None else weights_HRT[look.head]


def patches_of(sample: Sample) -> int:
    """Return how many patches its image has."""
    return 0 if sample.image_mask is None else len(sample.image_mask)


def attention_to_patches(model: M3AE, sample: Sample, queries: Sequence[int], look: Look = LAST) -> Tensor:
    """Return the part [R, L] of `attention_weights` that goes to the patches of an image, as fractions of it."""
    weights_RL = attention_weights(model, sample, queries, look)[:, 1 : 1 + patches_of(sample)]
    return weights_RL / weights_RL.sum(1, keepdim=True)


def draw_attention(
    model: M3AE,
    samples: Sequence[Sample],
    path: Path,
    count: int,
    word: str | None = None,
    look: Look = LAST,
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG: a row for each of the first `count` samples with an image, with the attention of cls and of the
    first words, or of `word` alone, laid over it from blue, none, to red, the highest. `channels`: what is shown, as in
    `figures.levels`.

    Raises:
        UserError: no sample has an image, or no caption has the word.
    """
    rows: list[list[Cell]] = []
    for sample in samples:
        if sample.image is None or len(rows) == count:
            continue
        words = {} if sample.tokens is None or model.tokenizer is None else _words(model, sample.tokens, word)
        if word is not None and not words:
            continue
        queries = [0, *(1 + patches_of(sample) + token for token in words)]
        weights_RL = attention_to_patches(model, sample, queries, look)
        image = levels(sample.image, model.config, channels)
        cells = [Cell(image)]
        for weights_L, text in zip(weights_RL, ["cls", *words.values()]):
            cells.append(Cell(_laid_over(image, weights_L, model.config.patch_size), text, RED))
        rows.append(cells)
    if not rows:
        raise UserError("none of the samples has an image" + (f" and {word!r} in its caption" if word else ""))
    draw_sheet(path, [*rows, [Cell(_key(rows[0][0].image), "blue none, red the most of that image")]])


def _words(model: M3AE, tokens: Tensor, word: str | None) -> dict[int, str]:
    """Return, by place in the caption, the tokens that begin a word, or that are `word`: each once, the first one."""
    assert model.tokenizer is not None
    texts = [model.tokenizer.token(token) for token in tokens.tolist()]
    found = {i: text for i, text in enumerate(texts) if (text.isalnum() if word is None else text == word.lower())}
    first = {text: place for place, text in reversed(found.items())}
    return {first[text]: text for text in list(dict.fromkeys(found.values()))[:_WORDS]}


def _laid_over(image: Tensor, weights_L: Tensor, patch: int) -> Tensor:
    """Return uint8 [3, H, W]: half the image, half a colour for each patch."""
    high = (weights_L / weights_L.max()).view(grid_of(image, patch))
    high = high.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return ((image[:3].expand(3, -1, -1) + _colours(high)) / 2).to(torch.uint8)


def _colours(high: Tensor) -> Tensor:
    """Return colours [3, H, W], from 0 to 255, of numbers [H, W] from 0, blue, to 1, red."""
    return torch.stack((high, 1 - (2 * high - 1).abs(), 1 - high)) * 255


def _key(like: Tensor | None) -> Tensor:
    """Return the colours from left to right, laid over grey as over an image of that size: uint8 [3, H, W]."""
    assert like is not None
    height, width = like.shape[1:]
    return ((127 + _colours(torch.linspace(0, 1, width).expand(height, -1))) / 2).to(torch.uint8)
