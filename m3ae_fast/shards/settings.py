"""Settings for the creation of shards."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from m3ae_fast.shards.options import ShardOptions


class Settings(ShardOptions):
    """Settings for the creation of shards: the options of the user, and others."""

    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality"""
    of_run: bool = False
    """whether the shards are made by a run of `pretrain`, which may replace them"""
