"""The MODEL of a command line: a run, a checkpoint, an export, or the same network untrained."""

from __future__ import annotations

from pathlib import Path

import torch

from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import Config, Range, parse
from m3ae_fast.errors import UserError
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.run import checkpoint
from m3ae_fast.weights.pretrained import build

RANDOM = "random:"
MODEL_HELP = (
    "a run folder (its last checkpoint; with train.ema the average), a checkpoint, an export folder, or random:RUN for "
    "that network untrained"
)


def load_model(name: str, *, text: bool, tokenizer: str | None = None, seed: int = 0) -> M3AE:
    """The model on the CPU, float32, with its tokenizer where text is asked for.

    Args:
        name: see MODEL_HELP.
        text: whether captions are going to be encoded.
        tokenizer: to be taken instead of the model's own.
        seed: of the weights of `random:RUN`.

    Raises:
        UserError: there is no such model, it is damaged, or it cannot take text though `text` is set.
    """
    if name.startswith(RANDOM):
        model, own = _untrained(name.removeprefix(RANDOM), seed)
    elif _is_run(Path(name)):
        path, config = _read_config(Path(name))
        model = build(lambda: M3AE(config.model, config.loss), checkpoint.read_weights(path), f"checkpoint {path}")
        own = config.data.tokenizer
    else:
        model, own = M3AE.from_pretrained(name), None
    if not text:
        return model
    if not model.config.vocab_size:
        raise UserError(f"{name}: is an image-only model, which cannot take text")
    wanted = tokenizer or own
    if wanted:
        model.tokenizer = load_tokenizer(wanted, model.config.text_length, model.config.vocab_size)
    if model.tokenizer is None:
        raise UserError(f"{name}: has no tokenizer with it; name one with --set data.tokenizer=FILE")
    return model


def set_range(model: MultimodalEncoder, image_range: Range | None) -> None:
    """Say what the values of the images are that the model will see; None: as of those it was trained on."""
    if image_range is not None:
        model.config = model.config.model_copy(update={"image_range": image_range})


def _untrained(name: str, seed: int) -> tuple[M3AE, str | None]:
    if _is_run(Path(name)):
        _, config = _read_config(Path(name))
        sizes, loss, tokenizer = config.model, config.loss, config.data.tokenizer
    else:
        pretrained = M3AE.from_pretrained(name)
        sizes, loss, tokenizer = pretrained.config, pretrained.loss_config, None
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return M3AE(sizes, loss), tokenizer


def _is_run(path: Path) -> bool:
    return (path / checkpoint.INFO_FILE).is_file() or bool(checkpoint.saved_steps(path))


def _read_config(path: Path) -> tuple[Path, Config]:
    found = checkpoint.locate(path)
    saved = checkpoint.read_info(found).config
    if "classifier" in saved or "probe" in saved:
        raise UserError(f"{path}: holds a classifier, the result of a transfer task; name the model that it began from")
    return found, parse(Config, saved, f"checkpoint {found}")
