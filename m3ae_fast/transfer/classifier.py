"""An encoder with a classification head.

Shapes: S samples, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.pooling import Pool


class Classifier(nn.Module):
    """`forward(batch)`: a batch with nothing masked -> logits [S, K]."""

    def __init__(self, backbone: MultimodalEncoder, head: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.backbone, self.head, self.pool = backbone, head, pool

    def features(self, batch: PackedBatch) -> Tensor:
        """[S, D] what the head reads."""
        return self.backbone.pooled(batch, self.pool)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.head(self.features(batch))
