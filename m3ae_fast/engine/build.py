"""Construction of the engine that the config selects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import dtype_of, has_compiler, keep_freed_memory
from m3ae_fast.config import Config
from m3ae_fast.config.section_protocols import TrainingSections
from m3ae_fast.data import split_batch
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.memory_estimate import lacking_for_activations, recomputes
from m3ae_fast.engine.parameter_groups import optimizer_groups
from m3ae_fast.engine.torch_engine import TorchEngine
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.transformer import Blocks
from m3ae_fast.process.ranks import Ranks


def build_engine(
    model: M3AE, config: Config, ranks: Ranks, others: Callable[[int, int], float] = lambda samples, parts: 0.0
) -> ModelEngine:
    """Build the engine for pre-training. On a GPU, blocks that may recompute activations (see `recomputes`) keep all of
    them if there is enough memory. `others`: function that returns the bytes that a step requires for other purposes,
    given the number of samples in a micro-batch and the number of micro-batches in a step. See `make_engine` for the
    other arguments and errors."""
    groups = optimizer_groups(model, config.optim)
    transformers = (model.encoder, model.decoder)
    keep, memory = False, ""
    if ranks.device.type == "cuda" and recomputes(config.train):
        share = split_batch(config.train, ranks.world)
        more = others(share.micro_batch, share.accumulation)
        lacking = lacking_for_activations(config, ranks, share.micro_batch, more)
        again = "the outputs of GELU and LayerNorm are recomputed in the backward pass; to keep all activations,"
        keep, memory = not lacking, f"activations: {f'{again} {lacking}' if lacking else 'all are kept'}"
    engine = make_engine(model, groups, transformers, config, ranks, keep)
    engine.memory = memory
    return engine


def make_engine(
    model: nn.Module,
    groups: list[dict],
    transformers: Sequence[Blocks],
    config: TrainingSections,
    ranks: Ranks,
    keep_activations: bool = False,
) -> ModelEngine:
    """Build an engine for `model`, and move the model to the ranks' device.

    Args:
        model: the module to train, which returns StepLosses.
        groups: the optimiser's parameter groups, which contain all parameters; see `build_optimizer`.
        transformers: parts of the model that are compiled, and whose activations are checkpointed, according to
            `config.train`.
        config: the config of the run, with resolved precision.
        ranks: the ranks of the run.
        keep_activations: whether compiled blocks keep all activations; otherwise they recompute some of them (see
            `Blocks.compile_blocks`).

    Raises:
        UserError: a setting requires something that this machine does not have, the batch cannot be split over the
            ranks, or DeepSpeed rejects its section.
    """
    if ranks.device.type == "cpu":
        keep_freed_memory()
    train, optim = config.train, config.optim
    if train.compile and not has_compiler():
        raise UserError("train.compile: needs a C++ compiler; install g++, or set train.compile=false")
    share = split_batch(train, ranks.world)
    for transformer in transformers:
        transformer.checkpointing = train.activation_checkpointing
        if train.compile:
            transformer.compile_blocks(share.micro_batch, keep_activations)
    dtype = dtype_of(train.precision)
    if config.deepspeed is None:
        return TorchEngine(model, groups, optim, dtype, ranks, train.ema)
    if not config.deepspeed.is_needed(ranks.world):  # here, DeepSpeed would only copy gradients into its own buffers
        stage = config.deepspeed.zero_optimization.stage
        engine = TorchEngine(model, groups, optim, dtype, ranks, train.ema, masters=stage > 0)
        engine.name = f"plain torch, because ZeRO stage {stage} partitions nothing on one rank"
        return engine
    from m3ae_fast.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, groups, config.deepspeed, optim, dtype, ranks, share, train.ema)
