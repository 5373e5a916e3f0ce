"""What a config means, without training: parameters, FLOPs a sample, and memory a GPU by ZeRO stage."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from m3ae_fast.config import Config
from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.model.flops import executed_flops, reference_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.masking import draw_mask
from m3ae_fast.model.packing import Sample, pack

CAPTION_SHARE = 1 / 3  # of text_length, for the sample that stands for all: CC12M captions have about 20 words of 64


def report(config: Config, world: int | None = None) -> None:
    """Print what `config` needs on `world` GPUs (None: as many as one step without accumulation takes)."""
    with torch.device("meta"):
        model = M3AE(config.model, config.loss)
    parameters = sum(p.numel() for p in model.parameters())
    batch = _typical(config, model)
    micro = config.train.micro_batch or config.train.global_batch // (world or 1)
    world = world or max(config.train.global_batch // micro, 1)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"parameters            {parameters:,}")
    official = reference_flops(config.model, config.masking)
    console.print(
        f"FLOPs a sample        {official / 1e9:,.1f} G forward and backward, as the official code computes it"
    )
    ours = executed_flops(config.model, batch)
    console.print(f"                      {ours / 1e9:,.1f} G in this engine, for a caption of {_words(config)} tokens")
    console.print(
        f"batch                 {config.train.global_batch} = {world} GPUs x {micro} samples"
        f" x {max(config.train.global_batch // (world * micro), 1)} accumulated"
    )
    activations = micro * _activation_bytes(config, batch)
    table = Table("ZeRO stage", "weights", "gradients", "master + Adam", "activations", "GB a GPU")
    for stage in range(4):
        rows = [share / 1e9 for share in (*zero_bytes(parameters, stage, world, _bf16(config)), activations)]
        mark = " (this config)" if config.zero is not None and stage == config.zero.stage else ""
        table.add_row(f"{stage}{mark}", *(f"{gb:.2f}" for gb in (*rows, sum(rows))))
    console.print(table)
    console.print("activations are an estimate: what autograd keeps of each block, in the run's precision")


def zero_bytes(parameters: int, stage: int, world: int, bf16: bool) -> tuple[float, float, float]:
    """Bytes a GPU holds of (weights, gradients, fp32 master weights and Adam moments); ZeRO, arXiv 1910.02054."""
    master = 4 if bf16 and stage > 0 else 0  # stage 0 keeps float32 weights
    size = 2 if master else 4
    return (
        size * parameters / (world if stage >= 3 else 1),
        size * parameters / (world if stage >= 2 else 1),
        (8 + master) * parameters / (world if stage >= 1 else 1),
    )


def _bf16(config: Config) -> bool:
    return config.train.precision != "fp32"  # auto is bf16 on the GPUs that the table is about


def _words(config: Config) -> int:
    return round(config.model.text_length * CAPTION_SHARE) if config.model.vocab_size else 0


def _typical(config: Config, model: M3AE) -> PackedBatch:
    """One picture with a caption of usual length, masked."""
    m, masking = config.model, config.masking
    generator = torch.Generator().manual_seed(0)
    sample = Sample("typical", torch.zeros(m.channels, m.image_size, m.image_size, dtype=torch.uint8))
    sample.image_mask = draw_mask(m.patches_per_image, masking.image_ratio, generator)
    if m.vocab_size:
        sample.tokens = torch.zeros(_words(config), dtype=torch.int64)
        sample.text_mask = draw_mask(len(sample.tokens), masking.text_ratio, generator)
    return pack([sample], model.geometry)


def _activation_bytes(config: Config, batch: PackedBatch) -> float:
    """A block keeps, a row of width D: 2 norms, q, k, v, attention, 2 residual sums, and the MLP's hidden twice."""
    m = config.model
    size = 2 if _bf16(config) else 4
    kept = 1 if config.train.activation_checkpointing else 8 + 2 * m.mlp_ratio
    blocks = m.depth * batch.encoder.rows * m.emb_dim + m.dec_depth * batch.decoder.rows * m.dec_emb_dim
    return size * kept * blocks
