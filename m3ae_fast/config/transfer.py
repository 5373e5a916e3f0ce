"""Settings of `python -m m3ae_fast.transfer`: a section per task beside those that training has too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from m3ae_fast.config.load import apply_override, parse
from m3ae_fast.config.schema import Batch, DataConfig, RunConfig, Section


class EncodeConfig(Section):
    """Features of the frozen encoder on unmasked input."""

    pool: Literal["mean", "cls"] = "mean"
    """`mean`: over all tokens but cls, after the final norm; `cls`: the cls token."""
    batch: Batch = 64
    """Samples per forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware multiplies it faster."""


class KnnConfig(Section):
    """k-nearest-neighbour classification of frozen features."""

    k: int = Field(20, gt=0)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote is exp(cosine similarity / temperature)."""


class TransferConfig(Section):
    """A transfer task on a trained model."""

    run: RunConfig
    data: DataConfig
    encode: EncodeConfig = EncodeConfig()
    knn: KnnConfig = KnnConfig()


def transfer_config(given: dict, overrides: list[str]) -> TransferConfig:
    """The sections that the command line gives, with `section.key=value` overrides.

    Raises:
        UserError: a field is unknown, of the wrong type or impossible.
    """
    for override in overrides:
        apply_override(given, override)
    return parse(TransferConfig, given, "--set")
