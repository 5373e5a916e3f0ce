"""The run's configuration: one strict JSON file, typed sections, `--set` overrides, errors that name fields."""

from m3ae_fast.config.knn import USUAL_K, KnnConfig
from m3ae_fast.config.libraries import engine_libraries, require_libraries_of
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
from m3ae_fast.config.poolings import FOR_TEXTS, GRIDS, POOLINGS, POOLS, Pool, Pooling
from m3ae_fast.config.section import Section
from m3ae_fast.config.settings import (
    LONGEST,
    MAX_CHANNELS,
    MAX_VOCAB,
    Config,
    DataConfig,
    DeepSpeedConfig,
    KnnProbeConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    ZeroConfig,
)
from m3ae_fast.config.value_range import Range
