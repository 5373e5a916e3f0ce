"""Opening of a model by its name on the command line: a run, a checkpoint, an export, a name on the Hub, or a
randomly initialised network."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import uses_gpu
from m3ae_fast.base.metrics_file import METRICS_FILE
from m3ae_fast.base.output_folder import MODEL_FILE, read_folder_config
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import LossConfig, ModelConfig, parse
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, build
from m3ae_fast.weights.model_name import RANDOM


@dataclass(frozen=True)
class SavedRun:
    """A run's checkpoint with the settings stored in it."""

    path: Path
    info: checkpoint.Info
    config: ModelConfig
    loss: LossConfig
    tokenizer: str | None  # file or name of the tokenizer, as in the run's config
    ema: float | None  # decay of the moving average of the weights, if the checkpoint contains one


def is_run(path: Path) -> bool:
    """Return whether `path` is a checkpoint, or a run folder with one."""
    return (path / checkpoint.INFO_FILE).is_file() or bool(checkpoint.saved_steps(path))


def refuse_part(path: Path, source: str) -> None:
    """Raise UserError, with what to specify instead, if `path` is a file of a checkpoint or an export, a folder inside
    a run that contains no model, or a run without a checkpoint. `source`: the name that the user has given."""
    if path.is_file():
        ours = (path.parent / checkpoint.INFO_FILE).is_file() or "emb_dim" in read_folder_config(path.parent)
        if ours and path.suffix in (".json", ".safetensors"):
            raise UserError(f"{source}: is one file of a checkpoint or an export; specify its folder, {path.parent}")
    elif path.is_dir() and not (path / MODEL_FILE).is_file():
        if is_run(path.parent):
            checkpoints = checkpoint.checkpoints_dir(path.parent)
            raise UserError(
                f"{source}: specify the run folder, {path.parent}, or one of the checkpoints in {checkpoints}"
            )
        if (path / METRICS_FILE).is_file() or "run" in read_folder_config(path):
            raise UserError(f"{source}: this run has no checkpoint yet; continue the run, or specify another model")


def saved_run(run: Path) -> SavedRun:
    """Return the settings of the last checkpoint of a run folder, or of the checkpoint `run`. Raises UserError if there
    is no checkpoint, or if it is damaged or contains a classifier."""
    path = checkpoint.locate(run)
    info = checkpoint.read_info(path)
    if "classifier" in info.config or "task" in info.config:
        raise UserError(
            f"{run}: contains a classifier, the result of an evaluation; specify the model from which it was trained"
        )

    def setting(section: str, key: str) -> Any:
        return (info.config.get(section) or {}).get(key)

    where = f"checkpoint {path}"
    config = parse(ModelConfig, info.config.get("model"), where)
    loss = parse(LossConfig, info.config.get("loss") or {}, where)
    return SavedRun(path, info, config, loss, setting("data", "tokenizer"), setting("train", "ema"))


def run_weights(run: SavedRun, *, average: bool = True) -> Pretrained:
    """Return the weights of a run of any ZeRO stage, with the tokenizer in its config. `average`: whether to
    return the moving average of the weights if the run has train.ema. Raises UserError if the checkpoint is damaged."""
    state = checkpoint.read_weights(run.path, average=average)
    kind, notes, tokenizer = f"checkpoint {run.path}", [], None
    if average and run.ema:
        kind += f", the average of its weights (train.ema {run.ema:g})"
    if run.config.vocab_size and run.tokenizer:
        try:
            tokenizer = load_tokenizer(run.tokenizer, run.config.text_length, run.config.vocab_size)
        except UserError as error:  # the weights can still be used
            notes.append(f"the tokenizer is left out: {error}")
    return Pretrained(run.config, state, tokenizer, run.loss.norm_pix, kind, tuple(notes))


def open_model(name: str, *, text: bool, tokenizer: str | None = None, seed: int = 0) -> M3AE:
    """Return a model on the CPU in float32, with its tokenizer if `text` is set.

    Args:
        name: name of the model; see `model_name.MODEL_HELP`.
        text: whether captions will be encoded.
        tokenizer: tokenizer to use instead of the model's own.
        seed: random seed of the weights of `random:MODEL`.

    Raises:
        UserError: the model does not exist or is damaged; or `text` is set, but the model does not accept text or has
            no tokenizer.
    """
    model, own = _opened(name, seed)
    if not text:
        return model
    if not model.config.vocab_size:
        raise UserError(f"{name}: is an image-only model, which does not accept text")
    if wanted := tokenizer or own:
        model.tokenizer = load_tokenizer(wanted, model.config.text_length, model.config.vocab_size)
    if model.tokenizer is None:
        raise UserError(f"{name}: has no tokenizer; specify one with --set data.tokenizer=FILE")
    return model


def load_model(
    name: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> M3AE:
    """Return a model in evaluation mode in float32, with its tokenizer if it has one.

    Args:
        name: a run folder (its last checkpoint is used, with the averaged weights if train.ema is set), a checkpoint,
            an export folder, a name on the Hugging Face Hub, or `random:` before any of them for the same network with
            random weights.
        tokenizer: file or name of a caption tokenizer to use instead of the model's own.
        seed: random seed of random weights.
        device: device for the model; by default the CPU, even if there is a GPU.

    Raises:
        UserError: the model does not exist or is damaged, `tokenizer` does not fit it, or torch finds no GPU although
            `device` is one.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"load_model: the name of a model must be a str or a path, not {type(name).__name__}")
    if torch.device(device).type == "cuda":
        uses_gpu("cuda")
    model, own = _opened(os.fspath(name), seed)
    lengths = model.config.text_length, model.config.vocab_size
    if tokenizer is not None:
        if not model.config.vocab_size:
            raise UserError(f"{name}: is an image-only model, which does not accept text; leave out the tokenizer")
        model.tokenizer = load_tokenizer(tokenizer, *lengths)
    elif own and model.config.vocab_size:
        try:
            model.tokenizer = load_tokenizer(own, *lengths)
        except UserError as error:  # the model can still encode images
            logging.getLogger(__name__).warning("the tokenizer is left out: %s", error)
    return model.to(device).eval()


def _opened(name: str, seed: int) -> tuple[M3AE, str | None]:
    """Return a model on the CPU, and the name of the tokenizer in the config of its run."""
    source = name.removeprefix(RANDOM)
    if not source:
        raise UserError("the name of the model is empty; specify a run, a checkpoint, an export or a name on the Hub")
    if is_run(Path(source)):
        run = saved_run(Path(source))
        own = run.tokenizer
        if source == name:
            state = checkpoint.read_weights(run.path)
            model = build(lambda: M3AE(run.config, run.loss), state, f"checkpoint {run.path}")
        else:
            model = untrained(run.config, run.loss, seed)
    else:
        refuse_part(Path(source), source)
        own, model = None, M3AE.from_pretrained(source)
        if source != name:
            model, trained = untrained(model.config, model.loss_config, seed), model
            model.tokenizer = trained.tokenizer
    return model, own


def untrained(config: ModelConfig, loss: LossConfig, seed: int) -> M3AE:
    """Return a model with random weights, such as that of `random:MODEL`. `seed`: random seed of the weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return M3AE(config, loss)
