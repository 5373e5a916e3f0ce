"""What a training run saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m3ae_fast.batch.tokenizer import CaptionTokenizer, load_tokenizer
from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.convert.result import Converted
from m3ae_fast.errors import UserError
from m3ae_fast.run import checkpoint


@dataclass(frozen=True)
class RunWeights:
    """A checkpoint as weights, and what it knows of its run."""

    path: Path
    info: checkpoint.Info
    weights: Converted
    average: float | None  # decay (train.ema) of the moving average that they are


def is_run(path: Path) -> bool:
    """Whether `path` is a checkpoint, or a run folder with one."""
    return (path / checkpoint.INFO_FILE).is_file() or bool(checkpoint.saved_steps(path))


def read_run(run: Path, *, average: bool = True) -> RunWeights:
    """The last checkpoint of a run folder, or the checkpoint `run` itself, with the tokenizer that its config names.

    Of a run with train.ema it is the moving average of the weights, unless `average` is false.

    Whatever ZeRO stage trained it: checkpoints hold whole float32 tensors.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    path = checkpoint.locate(run)
    info = checkpoint.read_info(path)
    config = parse(ModelConfig, info.config.get("model"), f"checkpoint {path}")
    state = checkpoint.read_weights(path, average=average)
    tokenizer, notes = _tokenizer(config, (info.config.get("data") or {}).get("tokenizer"))
    decay = (info.config.get("train") or {}).get("ema") if average else None
    kind = f"checkpoint {path}" + (f", the average of its weights (train.ema {decay:g})" if decay else "")
    return RunWeights(path, info, Converted(config, state, tokenizer, kind=kind, notes=notes), decay)


def _tokenizer(config: ModelConfig, name: str | None) -> tuple[CaptionTokenizer | None, tuple[str, ...]]:
    """None, and why, where it is no longer there: the weights are worth having without."""
    if not config.vocab_size or not name:
        return None, ()
    try:
        return load_tokenizer(name, config.text_length, config.vocab_size), ()
    except UserError as error:
        return None, (f"the tokenizer is left out: {error}",)
