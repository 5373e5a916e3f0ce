"""The optional libraries that a config requires."""

from __future__ import annotations

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config.settings import Config


def require_libraries_of(config: Config) -> None:
    """Raise UserError if a library that a run requires is not installed. Shards that are listed in a manifest are not
    checked, because they are known only when the manifest is read."""
    needs = {} if config.deepspeed is None else {"deepspeed": "the section deepspeed"}
    # loggers are named after their libraries
    require_libraries(needs | dict.fromkeys(config.run.loggers, "run.loggers"))
    probe = config.train.probe
    sources = [*config.data.train, *config.data.val, *([*probe.train, *probe.val] if probe else [])]
    for source in sources:
        s3_and_gs.require(*([source.shards] if isinstance(source.shards, str) else source.shards))
