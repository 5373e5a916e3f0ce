"""The base class of the sections of a config, and types of settings in several sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

# The upper bounds are far above all useful values. They turn a typo into an error instead of an overflow or an endless
# start-up.
Size = Annotated[int, Field(gt=0, le=1 << 16)]  # a width, or a number of pixels or tokens
Layers = Annotated[int, Field(gt=0, le=1024)]
Batch = Annotated[int, Field(gt=0, le=1 << 24)]  # a number of samples
Count = Annotated[int, Field(gt=0, le=1 << 40)]
Rate = Annotated[float, Field(ge=0, lt=1)]

Beta = Annotated[float, Field(ge=0, lt=1)]
# one number per channel; not strict, because pydantic's strict mode does not accept a JSON array for a tuple
Channels = Annotated[tuple[float, ...], Strict(False)]


def _named(path: Any) -> Any:
    if path == "":
        raise ValueError("is empty; specify a path")
    return path


NamedPath = Annotated[Path, BeforeValidator(_named)]  # pathlib would treat "" as the current folder


class Section(BaseModel):
    """A section of the config. Unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,
        use_attribute_docstrings=True,
    )
