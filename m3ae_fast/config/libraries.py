"""The optional libraries that a config requires."""

from __future__ import annotations

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config.section_protocols import TrainingSections
from m3ae_fast.config.settings import Config


def require_libraries_of(config: Config, ranks: int) -> None:
    """Raise UserError if a library that a run on this number of ranks requires is not installed. Shards that are listed
    in a manifest are not checked, because they are known only when the manifest is read."""
    # the name of a logger is also the name of its library
    require_libraries(engine_libraries(config, ranks) | dict.fromkeys(config.run.loggers, "run.loggers"))
    probe = config.train.probe
    sources = [*config.data.train, *config.data.val, *([*probe.train, *probe.val] if probe else [])]
    for source in sources:
        s3_and_gs.require(*([source.shards] if isinstance(source.shards, str) else source.shards))


def engine_libraries(config: TrainingSections, ranks: int) -> dict[str, str]:
    """Return the libraries that the engine needs on this number of ranks, each with the section that selects it."""
    is_needed = config.deepspeed is not None and config.deepspeed.is_needed(ranks)
    return {"deepspeed": "the section deepspeed"} if is_needed else {}
