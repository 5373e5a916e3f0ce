"""The run's configuration: one strict JSON file, typed sections, `--set` overrides, errors that name fields."""

from m3ae_fast.config.libraries import require_libraries_of
from m3ae_fast.config.load import (
    Overrides,
    follow,
    load_config,
    override_list,
    parse,
    read_config,
    shipped_configs,
    stored_config,
)
from m3ae_fast.config.schema import (
    GRIDS,
    LONGEST,
    MAX_CHANNELS,
    MAX_VOCAB,
    POOLS,
    USUAL_K,
    Config,
    DataConfig,
    DeepSpeedConfig,
    KnnConfig,
    KnnProbeConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    Pool,
    RunConfig,
    Section,
    SourceConfig,
    TrainConfig,
    ZeroConfig,
)
from m3ae_fast.config.value_range import Range
