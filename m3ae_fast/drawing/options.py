"""The options of `m3ae-fast draw`, which are also the arguments of the functions of `run_figures`. This module does not
import torch, so that `--help` is fast."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.arguments import Arguments, Layers, Name, Option, names, output


def _patch(value: Any) -> Any:
    if value is None:
        return None
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    if not re.fullmatch(r"\d{1,5},\d{1,5}", text):
        raise ValueError("must be ROW,COLUMN, such as 0,0")
    return tuple(map(int, text.split(",")))


class DrawOptions(Arguments):
    """The options that all figures have."""

    run: Annotated[Name, Option("run", metavar="RUN")]
    """a run folder (its last checkpoint is used), a checkpoint folder, or an export (requires val and out)"""
    out: Annotated[Annotated[Path, BeforeValidator(output(".png"))] | None, Option(metavar="FILE.png")] = None
    """output file (default: reconstructions.png or attention.png in RUN)"""
    val: Annotated[Sequence[str], BeforeValidator(names), Option(nargs="+", metavar="SHARDS")] = ()
    """samples to draw (default: samples of the run)"""
    pictures: Annotated[int, Field(ge=1)] = 12
    """number of samples to draw"""
    trust: bool = False
    """open all shards named in the run's config, including `pipe:` shards, which execute commands"""


class ReconstructionsOptions(DrawOptions):
    """The options of `m3ae-fast draw reconstructions`."""

    ratios: Annotated[Sequence[Annotated[float, Field(ge=0, le=1)]], Option(nargs="+", metavar="R")] = ()
    """mask ratios of the image (default: the mask ratio of the run; for an export, that of the default settings)"""


class AttentionOptions(DrawOptions):
    """The options of `m3ae-fast draw attention`."""

    word: str | None = None
    """word whose attention over the patches is drawn (default: the first words of each caption)"""
    patch: Annotated[tuple[int, int] | None, BeforeValidator(_patch), Option(metavar="R,C")] = None
    """patch whose attention over the words is drawn: its row and column, counted from 0"""
    layers: Annotated[Layers, Option(metavar="all|N,N")] = None
    """encoder blocks whose attention is drawn, counted from 1 (default: the last)"""

    @model_validator(mode="after")
    def _has_one_figure(self) -> AttentionOptions:
        if self.word is not None and self.patch is not None:
            raise UserError("patch: cannot be combined with word; leave out one of the two")
        return self
