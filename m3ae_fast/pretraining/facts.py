"""Hold the facts that settings depend on: about the samples, and the shards that they are in."""

from __future__ import annotations

from dataclasses import dataclass

TOKENIZER = "tokenizer.json"  # of a run folder


@dataclass(frozen=True)
class Shards:
    """Patterns for the config, and what to tell the user."""

    train: list[str]
    val: list[str]  # empty: nothing is held out
    notes: list[str]
    unlabelled: str = ""  # why samples have no label "cls", where that is known


@dataclass(frozen=True)
class Facts:
    """Of the training samples, and of what is held out."""

    samples: int
    held_out: int
    short_side: int  # pixels, the median
    image_mean: list[float]
    image_std: list[float]
    classes: int  # 0: there are no labels that can be used
    vocab_size: int  # 0: there are no captions
    text_length: int  # tokens
