"""The options of `m3ae-fast embed`, which are also the arguments of `m3ae_fast.embed`. This module does not import
torch, so that `--help` is fast."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.arguments import CommaList, Labels, Option, WithSettings, names, output
from m3ae_fast.evaluation.tasks import Modality
from m3ae_fast.weights.model_name import IMAGE_FEATURES, LIBRARY_HELP, MODEL_HELP, is_network

Column = Literal["path", "class", "caption"]


def _model(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class EmbedOptions(WithSettings):
    """The options of `m3ae-fast embed`."""

    # in Python, the model may also be an object, a MultimodalEncoder
    model: Annotated[Any, BeforeValidator(_model), Option("model", metavar="MODEL")] = Field(
        description=f"{MODEL_HELP}; {LIBRARY_HELP}; or {', '.join(IMAGE_FEATURES)}: features without a network"
    )
    source: Annotated[
        Sequence[str], BeforeValidator(names), Field(min_length=1), Option("source", nargs="+", metavar="SOURCE")
    ]
    """shards (paths, brace patterns, globs, URLs), a folder of images or of shards, or image files"""
    out: Annotated[
        Annotated[Path, BeforeValidator(output(".parquet", ".npz"))] | None, Option(required=True, metavar="FILE")
    ] = None
    """output file, .parquet or .npz"""
    labels: Labels = "cls"
    """source of the labels: cls (integers in KEY.cls; default) or json.FIELD (a field of KEY.json)"""
    modality: Modality = "image"
    """input of the encoder"""
    patches: bool = False
    """also write the features of all patches, which makes the file large"""
    columns: Annotated[Sequence[Column], CommaList, Option(metavar="NAME,NAME")] = ()
    """further columns to write for each sample (default: none)"""

    @model_validator(mode="after")
    def _has_patches(self) -> EmbedOptions:
        if self.patches and self.modality == "text":
            raise UserError("patches: texts have no patches; choose another modality")
        if self.has_one_vector and (self.patches or self.modality != "image"):
            wrong = "patches" if self.patches else f"modality {self.modality}"
            raise UserError(f"{wrong}: {self.model} has one vector of features for each image; leave it out")
        return self

    @property
    def has_one_vector(self) -> bool:
        """Return whether the model has one vector of features for each image, and neither poolings nor patch tokens."""
        return isinstance(self.model, str) and not is_network(self.model)
