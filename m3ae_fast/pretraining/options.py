"""The options of `m3ae-fast pretrain`, which are also the arguments of `m3ae_fast.pretrain`. This module does not
import torch, so that `--help` is fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.arguments import Labels, Name, Option, WithSettings, names, output
from m3ae_fast.config.recipes import HELP, Recipe
from m3ae_fast.pretraining.automatic_settings import check_overrides, teacher_settings
from m3ae_fast.pretraining.recipe_choice import PREFERRED, check_recipe
from m3ae_fast.shards.options import ColumnOptions, GroupOption


class PretrainOptions(WithSettings, GroupOption, ColumnOptions):
    """The options of `m3ae-fast pretrain`."""

    source: Annotated[Name, Option("source", metavar="SOURCE")]
    """a folder of images, shards, an HDF5 file, or a Hugging Face dataset (a name on the Hub, or a folder)"""
    out: Annotated[Path, BeforeValidator(output()), Option(metavar="OUT")]
    """the run folder"""
    hours: Annotated[float, Field(gt=0, lt=10_000)] = 0.5
    """time limit in hours for all stages on this machine; the training length is adapted to it"""
    captions: Annotated[Path | None, Option(metavar="TABLE")] = None
    """table of captions, .csv, .tsv, .jsonl or .parquet (default: the table in the folder)"""
    val: Annotated[
        Sequence[str], BeforeValidator(names), Option(nargs="+", metavar="SHARDS", group="held-out samples")
    ] = ()
    """held-out shards, if SOURCE consists of shards (default: those named val or test, or the last tenth)"""
    labels: Labels = "cls"
    """source of the labels: cls (integers in KEY.cls; default) or json.FIELD (a field of KEY.json)"""
    start_from: Annotated[Name | None, Option("--from", metavar="MODEL")] = None
    """initial weights: a run, an export, official M3AE or MAE weights, timm weights, or a name on the Hub; training
    then uses a lower learning rate (default: random weights); in Python: start_from"""
    teacher: Annotated[Name | None, Option(metavar="MODEL", group="targets of images")] = None
    """a frozen model whose features are the targets of images: a run, an export, timm:NAME, timm:NAME=FILE for a
    timm model with weights in a file, or transformers:NAME (default: the targets of the recipe)"""
    recipe: Recipe | None = Field(
        None, description=f"{HELP} (default: {PREFERRED[0]}, unless --from or a setting prevents it)"
    )
    dry_run: bool = False
    """create the shards, print the settings that would be chosen and the expected duration, and exit; OUT must not
    contain a run"""

    @model_validator(mode="after")
    def _possible(self) -> PretrainOptions:
        check_overrides(self.overrides, self.start_from, self.teacher)
        if self.teacher is not None and self.recipe == "hog":
            raise UserError("recipe hog: its targets are not the features of a teacher; leave out recipe or teacher")
        check_recipe(self.recipe, [*teacher_settings(self.teacher), *self.overrides], self.start_from)
        return self
