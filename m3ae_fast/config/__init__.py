"""The run's configuration: one strict JSON file, typed sections, `--set` overrides, errors that name fields."""

from m3ae_fast.config.load import load_config, parse
from m3ae_fast.config.schema import (
    MAX_VOCAB,
    Config,
    DataConfig,
    DeepSpeedConfig,
    LoopConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Section,
    SourceConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "MAX_VOCAB",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "LoopConfig",
    "LossConfig",
    "MaskingConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TrainConfig",
    "ZeroConfig",
    "load_config",
    "parse",
]
