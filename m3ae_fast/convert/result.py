"""What a conversion gives."""

from __future__ import annotations

from dataclasses import dataclass

from m3ae_fast.weights.pretrained import Pretrained

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std


@dataclass(frozen=True)
class Converted(Pretrained):
    """Weights of another program, or of a run, as ours."""

    kind: str = ""  # what the source was recognised as
    notes: tuple[str, ...] = ()  # what the user should know
