"""FLOPs of matmuls (2 per multiply-add), forward and backward, per sample or per packed batch.

Shapes: N rows of a sequence, D width. With mlp_ratio 4, a block costs 24 D^2 N + 4 N^2 D FLOPs in the forward pass, and
twice that in the backward pass.
"""

from __future__ import annotations

import torch

from m3ae_fast.batch.masking import kept
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import MaskingConfig, ModelConfig


def _block(dim: int, mlp_ratio: float, keys: float, queries: float, pairs: float) -> float:
    """Return the forward FLOPs of one block with `keys` input rows, `queries` output rows and `pairs` query-key
    pairs."""
    return (4 * keys + (4 + 4 * mlp_ratio) * queries) * dim**2 + 4 * pairs * dim


def _heads(config: ModelConfig, image_rows: float, text_rows: float) -> float:
    width = config.dec_emb_dim
    hidden = config.output_head_depth * width
    image, text = image_rows * (hidden + config.image_output_dim), text_rows * (hidden + config.vocab_size)
    return 2 * width * (image + text)


def reference_flops(config: ModelConfig, masking: MaskingConfig, image: bool = True, text: bool = True) -> float:
    """Return the FLOPs of the official code for one training sample, forward and backward.

    The official code (of arXiv 2205.14204) embeds all patches, pads captions to `text_length`, and runs each head on
    every position of its modality. `image`, `text`: whether the sample has an image and a caption.
    """
    text = text and config.vocab_size > 0
    patches = config.patches_per_image if image else 0
    tokens = config.text_length if text else 0
    visible = 1 + kept(patches, masking.image_ratio) + kept(tokens, masking.text_ratio)
    rows = 1 + patches + tokens
    embed = 2 * patches * config.patch_dim * config.emb_dim
    forward = (
        embed
        + config.depth * _block(config.emb_dim, config.mlp_ratio, visible, visible, visible**2)
        + 2 * visible * config.emb_dim * config.dec_emb_dim
        + config.dec_depth * _block(config.dec_emb_dim, config.mlp_ratio, rows, rows, rows**2)
        + _heads(config, patches, tokens)
    )
    return 3 * forward - embed  # pixels have no gradient


def executed_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """Return the FLOPs of this engine for the samples of a packed batch, forward and backward, without padding. `batch`
    must be on the CPU."""
    encoder, decoder = (s.cu_seqlens[: len(batch.keys) + 1].diff() for s in (batch.encoder, batch.decoder))
    image, text = batch.image_row_weight > 0, batch.text_row_weight > 0
    patches, image_rows, text_rows = (int(real.sum()) for real in (batch.encoder_src >= 0, image, text))
    loss_M = batch.loss_rows[torch.cat((batch.image_rows[image], batch.text_rows[text]))]
    keys_S = encoder if config.dec_attention == "cross" else decoder
    keys_M = keys_S.repeat_interleave(decoder)[loss_M]
    embed = 2 * patches * config.patch_dim * config.emb_dim
    visible, rows, loss_rows = int(encoder.sum()), int(decoder.sum()), len(loss_M)
    width = config.dec_emb_dim
    if config.dec_attention == "cross":
        decoder_flops = config.dec_depth * _block(width, config.mlp_ratio, visible, loss_rows, int(keys_M.sum()))
    else:
        decoder_flops = (config.dec_depth - 1) * _block(width, config.mlp_ratio, rows, rows, _pairs(decoder))
        decoder_flops += _block(width, config.mlp_ratio, rows, loss_rows, int(keys_M.sum()))
    forward = (
        embed
        + config.depth * _block(config.emb_dim, config.mlp_ratio, visible, visible, _pairs(encoder))
        + 2 * visible * config.emb_dim * width
        + decoder_flops
        + _heads(config, image_rows, text_rows)
    )
    return 3 * forward - embed


def encoding_flops(config: ModelConfig) -> float:
    """Return the FLOPs of the encoder for one unmasked square image, forward only."""
    patches, dim = config.patches_per_image, config.emb_dim
    rows = 1 + patches
    return 2 * patches * config.patch_dim * dim + config.depth * _block(dim, config.mlp_ratio, rows, rows, rows**2)


def _pairs(lengths_S: torch.Tensor) -> int:
    return int(lengths_S.long().square().sum())
