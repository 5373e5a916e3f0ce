"""The engine that a config asks for."""

from __future__ import annotations

from m3ae_fast.config import Config
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.schedule import split_batch
from m3ae_fast.engine.torch_engine import TorchEngine
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import dtype_of, has_compiler, keep_freed_memory
from m3ae_fast.model.m3ae import M3AE


def build_engine(model: M3AE, config: Config, ranks: Ranks) -> Engine:
    """`config` with its precision settled. Raises UserError where it asks for what this machine lacks."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    model.encoder.checkpointing = model.decoder.checkpointing = config.train.activation_checkpointing
    if config.train.compile:
        if not has_compiler():
            raise UserError("train.compile: needs a C++ compiler; install g++, or set train.compile=false")
        model.encoder.compile_blocks()
        model.decoder.compile_blocks()
    dtype = dtype_of(config.train.precision)
    if config.deepspeed is None:
        return TorchEngine(model, config.optim, dtype, ranks, config.train.ema)
    from m3ae_fast.engine.deepspeed_engine import DeepSpeedEngine

    share = split_batch(config.train, ranks.world)
    return DeepSpeedEngine(model, config.deepspeed, config.optim, dtype, ranks, *share, config.train.ema)
