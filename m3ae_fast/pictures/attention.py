"""Draws where the encoder looks: attention of cls and of words over the patches of their image, as the paper does.

Shapes: L patches, R queries, T rows of a sample (cls, patches, text), H heads, d values a head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.transformer import Block
from m3ae_fast.pictures.figures import RED, Cell, draw_sheet

_WORDS = 7  # at most, of one caption


@torch.no_grad()
def attention_to_patches(model: M3AE, sample: Sample, queries: Sequence[int]) -> Tensor:
    """Return weights [R, L] of the last encoder block, mean over heads, of rows `queries` (0 is cls, 1 + L + i the i-th
    token) of an unmasked sample that has an image; each query's sum to 1 over the patches."""
    seen: list[Tensor] = []
    block = cast(Block, model.encoder.blocks[-1])
    with block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model.forward_encoder(pack([sample], model.geometry))
    heads, patches = block.attn.num_heads, model.config.patches_per_image
    _, qkv = block.attn.qkv(block.norm1(seen[0]))
    q_THd, k_THd, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    scores_HRT = torch.einsum("rhd,thd->hrt", q_THd[list(queries)], k_THd) / math.sqrt(q_THd.shape[-1])
    weights_RL = scores_HRT.softmax(-1).mean(0)[:, 1 : 1 + patches]
    return weights_RL / weights_RL.sum(1, keepdim=True)


def draw_attention(model: M3AE, samples: Sequence[Sample], path: Path, count: int, word: str | None = None) -> None:
    """Write a PNG: a row for each of the first `count` samples with an image, with the attention of cls and of the
    first words, or of `word` alone, laid over it from blue, none, to red, the highest.

    Raises:
        UserError: no sample has an image, or no caption has the word.
    """
    length = model.config.patches_per_image
    rows: list[list[Cell]] = []
    for sample in samples:
        if sample.image is None or len(rows) == count:
            continue
        words = {} if sample.tokens is None or model.tokenizer is None else _words(model, sample.tokens, word)
        if word is not None and not words:
            continue
        queries = [0, *(1 + length + token for token in words)]
        weights_RL = attention_to_patches(model, sample, queries)
        cells = [Cell(sample.image)]
        for weights_L, text in zip(weights_RL, ["cls", *words.values()]):
            cells.append(Cell(_laid_over(sample.image, weights_L, model.config.patch_size), text, RED))
        rows.append(cells)
    if not rows:
        raise UserError("none of the samples has an image" + (f" and {word!r} in its caption" if word else ""))
    draw_sheet(path, rows)


def _words(model: M3AE, tokens: Tensor, word: str | None) -> dict[int, str]:
    """Return, by place in the caption, the tokens that begin a word, or the ones that are `word`."""
    assert model.tokenizer is not None
    texts = [model.tokenizer.token(token) for token in tokens.tolist()]
    found = {i: text for i, text in enumerate(texts) if (text.isalnum() if word is None else text == word.lower())}
    return dict(list(found.items())[:_WORDS])


def _laid_over(image: Tensor, weights_L: Tensor, patch: int) -> Tensor:
    """Return uint8 [3, H, W]: half the image, half a colour for each patch."""
    side = image.shape[-1] // patch
    high = (weights_L / weights_L.max()).view(side, side)
    high = high.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    colour = torch.stack((high, 1 - (2 * high - 1).abs(), 1 - high)) * 255
    return ((image.expand(3, -1, -1) + colour) / 2).to(torch.uint8)
