"""What a conversion gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from m3ae_fast.config import ModelConfig
from m3ae_fast.model.tokenizer import CaptionTokenizer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std


@dataclass(frozen=True)
class Converted:
    """Weights of another program as ours."""

    kind: str  # what the source was recognised as
    config: ModelConfig
    state: dict[str, Tensor]  # by our names; of an encoder alone, or of everything
    notes: tuple[str, ...] = ()  # what the user should know
    tokenizer: CaptionTokenizer | None = None
