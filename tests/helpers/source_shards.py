"""The shards of a source, found in the same way as by `pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3ae_fast.config import Range
from m3ae_fast.pretraining import source_shards
from m3ae_fast.pretraining.automatic_settings import Shards
from m3ae_fast.pretraining.options import PretrainOptions


def find_shards(
    source: str,
    out: Path,
    captions: Path | None,
    val: Sequence[str],
    value_range: Range | None = None,
    *,
    kept: Sequence[str] = (),
    start_range: Range | None = None,
    **options: Any,
) -> Shards:
    """Return the shards, given the options of `pretrain` one by one."""
    given = PretrainOptions(source=source, out=out, captions=captions, val=val, **options)
    return source_shards.find_shards(given, value_range, kept=kept, start_range=start_range)
