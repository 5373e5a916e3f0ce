"""The engine of the linear probe: each step computes features with the frozen encoder and updates the head with LARS.

Shapes: S samples, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.fragments import Fragments, cut
from m3ae_fast.engine.interface import Read
from m3ae_fast.engine.optimizer import Kinds
from m3ae_fast.evaluation.labelled_task import ClassLosses
from m3ae_fast.heads.fit_heads import Stack
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.stacked_optimizers import LARS
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.process.ranks import Ranks


class ProbeEngine:
    """An engine that trains a head on the features of a frozen encoder; `engine.interface.Engine` describes its
    methods.

    The statistics of BatchNorm are those of a whole step, as in the official code; see `Stack`.
    """

    model: nn.Module

    def __init__(self, heads: LinearHeads, config: EvaluationConfig, ranks: Ranks, model: MultimodalEncoder) -> None:
        """Create the engine. `heads`: a stack of one head; `model`: the frozen encoder."""
        self.before_update: Callable[[], None] = lambda: None
        self.kinds: Kinds = {name: ("momentum",) for name, _ in heads.named_parameters()}
        self.model, self.ranks, self.frozen, self.encode = heads, ranks, model, config.encode
        self.lars = LARS(heads.parameters(), weight_decay=config.optim.weight_decay)
        self.stack = Stack(heads, self.lars, torch.ones(1, device=ranks.device), ranks)
        for p in heads.parameters():
            self.lars.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def step(self, batches: Sequence, counts: float, lr: float) -> tuple[list[ClassLosses], Tensor]:
        with encoding(self.frozen, self.encode.precision, self.ranks.device):
            features_SD = torch.cat([self.frozen.pooled(batch, self.encode.fixed_pool) for batch in batches])
        labels_S = torch.cat([batch.labels for batch in batches])
        samples = int(self.ranks.sum([len(labels_S)])[0])
        self.before_update()  # must precede the forward pass, which already changes the statistics of BatchNorm
        if samples == 0:  # no sample could be read
            zero = features_SD.new_zeros(())
            return [ClassLosses(zero, zero)], zero
        loss_H, right_H = self.stack.step(features_SD, labels_S, samples, lr)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return [ClassLosses(loss_H[0], right_H[0])], norm

    def fragments(self) -> Fragments:
        return cut(self._tensors(), self.ranks.rank, self.ranks.world)

    def load_state(self, step: int, read: Read) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(read(name, 0, tensor.numel()).view_as(tensor))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        return tensors | {f"momentum/{name}": self._buffer(p) for name, p in self.model.named_parameters()}

    def _buffer(self, p: Tensor) -> Tensor:
        return self.lars.state[p]["momentum_buffer"]
