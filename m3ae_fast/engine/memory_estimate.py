"""Estimate of the memory per rank, itemised by consumer. `--dry-run` prints it, and the engine uses it to decide
whether to keep all activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from m3ae_fast.base.hardware import missing_memory
from m3ae_fast.batch.masking import draw_mask, draw_predicted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import Config, TransformerLoopConfig
from m3ae_fast.images.patch_grid import Grid
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import Ranks

CAPTION_FRACTION = 1 / 3  # of text_length, for the typical sample: CC12M captions have about 20 words of 64


def memory_needed(config: Config, world: int, samples: int) -> float:
    """Return the bytes that a rank needs for steps of so many samples, all activations kept."""
    with torch.device("meta"):
        model = M3AE(config.model, config.loss)
    parameters = sum(p.numel() for p in model.parameters())
    stage = 0 if config.zero is None else config.zero.stage
    micro = min(samples, config.train.micro_batch or samples)
    matrices = matrix_elements(config, model)
    weights = zero_bytes(parameters, stage, world, in_bf16(config), matrices)
    activations = micro * activation_bytes(config, typical_batch(config, model))
    return sum(weights) + max(activations, muon_bytes(matrices, stage, world))


def lacking_for_activations(config: Config, ranks: Ranks, samples: int) -> str:
    """Return an empty string if every rank has enough memory for all activations of a micro-batch, otherwise the
    shortfall of the first rank that has not. For the time before weights are on the device. Every rank must call it."""
    needed = memory_needed(config, ranks.world, samples)
    return next(filter(None, ranks.gather(missing_memory(needed, ranks.device))), "")


def recomputes(loop: TransformerLoopConfig) -> bool:
    """Return whether memory decides if outputs of GELU and LayerNorm are kept: where blocks are compiled."""
    return loop.compile and not loop.activation_checkpointing


def matrix_elements(config: Config, model: M3AE) -> int:
    """Return the number of weights that Muon updates."""
    return sum(p.numel() for p in model.hidden_matrices()) if config.optim.name == "muon" else 0


def muon_bytes(matrices: int, stage: int, world: int) -> float:
    """Return bytes per GPU that an update by Muon takes beside the state, when no activations are kept any more: the
    whole momentum's update in float32, and at most three times the matrices that this rank orthogonalises."""
    return 4 * matrices * (1 + 3 / (world if stage >= 1 else 1))


def zero_bytes(parameters: int, stage: int, world: int, bf16: bool, matrices: int = 0) -> tuple[float, float, float]:
    """Return bytes per GPU of (weights, gradients, fp32 master weights and moments); ZeRO, arXiv 1910.02054.
    Gradients are accumulated in float32. `matrices`: weights that Muon updates, with one moment instead of two."""
    master = 4 if bf16 and stage > 0 else 0  # stage 0 keeps float32 weights
    return (
        (2 if master else 4) * parameters / (world if stage >= 3 else 1),
        4 * parameters / (world if stage >= 2 else 1),
        ((8 + master) * parameters - 4 * matrices) / (world if stage >= 1 else 1),
    )


def in_bf16(config: Config) -> bool:
    return config.train.precision != "fp32"  # auto is bf16 on the GPUs that the estimate is about


def caption_tokens(config: Config) -> int:
    """Return the tokens of the typical caption."""
    return round(config.model.text_length * CAPTION_FRACTION) if config.model.vocab_size else 0


def typical_batch(config: Config, model: M3AE, grids: Sequence[Grid] | None = None) -> PackedBatch:
    """Return masked images with captions of usual length: native ones of these grids, or one of the largest square."""
    m, masking = config.model, config.masking
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(m.most_patches)
    samples = []
    for rows, columns in grids or [(side, side)]:
        shape = m.channels, rows * m.patch_size, columns * m.patch_size
        sample = Sample("typical", torch.zeros((), dtype=getattr(torch, model.config.image_dtype)).expand(shape))
        sample.image_mask = draw_mask(rows * columns, masking.image_ratio, generator)
        sample.image_predicted = draw_predicted(sample.image_mask, masking.image_predicted, generator)
        if m.vocab_size:
            sample.tokens = torch.zeros(caption_tokens(config), dtype=torch.int64)
            sample.text_mask = draw_mask(len(sample.tokens), masking.text_ratio, generator)
            sample.text_predicted = draw_predicted(sample.text_mask, masking.text_predicted, generator)
        samples.append(sample)
    return pack(samples, model.geometry)


def activation_bytes(config: Config, batch: PackedBatch) -> float:
    """Return bytes of a batch: a block keeps, per row of width D, 2 norms, q, k, v, attention, 2 residual sums, and the
    MLP's hidden twice; a decoder with cross-attention, keys and values of the encoder's rows for each block."""
    m = config.model
    size = 2 if in_bf16(config) else 4
    kept = 1 if config.train.activation_checkpointing else 8 + 2 * m.mlp_ratio
    blocks = m.depth * batch.encoder.rows * m.emb_dim + m.dec_depth * batch.decoder.rows * m.dec_emb_dim
    keys_and_values = 2 * m.dec_depth * batch.encoder.rows * m.dec_emb_dim if m.dec_attention == "cross" else 0
    return size * (kept * blocks + keys_and_values)
