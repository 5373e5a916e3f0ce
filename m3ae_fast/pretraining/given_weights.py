"""The weights that `pretrain --from` continues from: an export in the run folder, and the settings that they imply."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import TOKENIZER_FILE
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.settings import SIZES
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_start, check_weights, missing_decoder, start_for
from m3ae_fast.pretraining.automatic_settings import assumed_config, channels_set
from m3ae_fast.weights.converting import convert
from m3ae_fast.weights.model_name import RANDOM

FOLDER = "start"  # name of the export's folder in the run folder
# model settings that are not determined by the weights
_FREE = ("drop_path", "init_from", "value_range", "pool")


class GivenWeights(NamedTuple):
    """Weights from which a run starts, stored as an export."""

    overrides: list[str]  # overrides of settings that the weights determine
    notes: list[str]  # notes for the user
    config: ModelConfig | None = None  # the config of the weights


def given_weights(model: str, out: Path, overrides: Sequence[str]) -> GivenWeights:
    """Write the weights of a model as an export to the run folder, and return the settings that they determine.

    Args:
        model: a run, a checkpoint, an export, weights of the official M3AE or MAE or of a timm model, or the name of
            any of these on the Hugging Face Hub.
        out: the run folder.
        overrides: the user's overrides, which take precedence over the returned overrides.

    Raises:
        UserError: the model does not exist or is damaged, or one of the user's settings does not fit the weights.
    """
    folder = out / FOLDER
    if not model:
        raise UserError("--from: is empty; specify a model")
    if model.startswith(RANDOM):
        raise UserError(f"--from {model}: is not a trained model; to start from random weights, leave out --from")
    try:
        found = convert(model, folder)
    except UserError as error:
        raise UserError(f"--from {error}" if str(error).startswith(model) else str(error)) from None
    if not isinstance(found, Pretrained):
        raise UserError(f"--from {model}: is an image tokenizer; specify the weights of a model")
    implied = {f"model.{name}": value for name, value in found.config.model_dump(mode="json").items()}
    implied = {name: value for name, value in implied.items() if name.removeprefix("model.") not in _FREE}
    implied |= {"model.size": None, "model.init_from": str(folder.resolve())}
    if found.config.vocab_size:
        tokenizer = folder / TOKENIZER_FILE
        implied["data.tokenizer"] = str(tokenizer.resolve()) if tokenizer.exists() else None
    if found.config.value_range is not None:
        implied["model.value_range"] = found.config.value_range
    if (channels := channels_set(overrides) or 0) > found.config.channels:
        # this mean and this standard deviation are placeholders until the images have been inspected
        implied |= {"model.channels": channels, "model.image_mean": [0.5] * channels}
        implied |= {"model.image_std": [0.25] * channels}
    given = [f"{name}={json.dumps(value)}" for name, value in implied.items()]
    try:
        missing = missing_decoder(found, _fitting(model, found, given, overrides))
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the run folder is kept if it is not empty
            out.rmdir()
        raise
    decoder = [f"{missing}, so the decoder is randomly initialised"] if missing else []
    return GivenWeights(
        given, [f"continuing from the weights in {folder} ({found.kind})", *decoder, *found.notes], found.config
    )


def _fitting(model: str, found: Pretrained, given: Sequence[str], own: Sequence[str]) -> Pretrained:
    """Return the weights with which the run starts. `given`: overrides of settings that the weights determine; `own`:
    the user's overrides. Raises UserError if the settings do not fit the weights; its message names the first override
    that does not fit."""
    try:
        return _fitting_all(model, found, [*given, *own])
    except UserError:
        for override in own:
            name, _, value = override.partition("=")
            if not name.startswith("model."):
                continue
            try:
                _fitting_all(model, found, [*given, override])
            except UserError:
                theirs = json.dumps(found.config.model_dump(mode="json").get(name.removeprefix("model.")))
                have = "" if theirs == "null" else f", which have {name}={theirs}"
                raise UserError(
                    f"override {name}={value}: does not fit the weights {model}{have}; leave it out"
                ) from None
        raise


def _fitting_all(model: str, found: Pretrained, overrides: Sequence[str]) -> Pretrained:
    """Return the weights with which the run starts. Raises UserError if the settings are invalid, or if they do not fit
    the weights."""
    config = assumed_config(overrides)
    m = config.model
    if m.size and SIZES[m.size] != (m.emb_dim, m.depth, m.num_heads):  # the weights determine these three values
        raise UserError(f"override model.size={m.size}: does not fit the weights {model}; leave it out")
    start = start_for(config.model, found, norm_pix=config.loss.norm_pix)
    check_start(config.model, start, model)
    with torch.device("meta"):
        check_weights(M3AE(config.model, config.loss), start.state, f"--from {model}")
    return start
