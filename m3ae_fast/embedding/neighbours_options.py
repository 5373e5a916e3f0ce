"""The options of `m3ae-fast neighbours`, which are also the arguments of `m3ae_fast.neighbours`. This module does not
import torch, so that `--help` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from m3ae_fast.config.arguments import Name, Option, WithSettings, output
from m3ae_fast.weights.model_name import IMAGE_FEATURES, LIBRARY_HELP, MODEL_HELP


class NeighboursOptions(WithSettings):
    """The options of `m3ae-fast neighbours`."""

    model: Annotated[Name, Option("model", metavar="MODEL")] = Field(
        description=f"{MODEL_HELP}; {LIBRARY_HELP}; or {', '.join(IMAGE_FEATURES)}: features without a network"
    )
    image: Annotated[Name, Option("image", metavar="IMAGE")]
    """image file whose neighbours are searched"""
    folder: Annotated[Name, Option("folder", metavar="FOLDER")]
    """folder whose images are searched, including those in its sub-folders"""
    out: Annotated[Annotated[Path, BeforeValidator(output(".png"))] | None, Option(metavar="FILE.png")] = None
    """draw the image and its neighbours to this file"""
    pictures: Annotated[int, Field(ge=1)] = 12
    """number of neighbours"""
