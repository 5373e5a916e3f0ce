"""Steps of a linear probe: features of a frozen encoder in, one LARS update of the head out.

Shapes: S samples, D encoder width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config.evaluation import EncodeConfig, EvaluationConfig, LinearProbeConfig
from m3ae_fast.data.order import permutation
from m3ae_fast.engine.fragments import Fragments, cut
from m3ae_fast.engine.interface import Read
from m3ae_fast.engine.optimizer import Kinds
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import LinearProbeHead
from m3ae_fast.evaluation.labelled_task import ClassLosses
from m3ae_fast.evaluation.lars import LARS
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.ranks import Ranks


class Live:
    """Heads in training, of which another thread may take a copy between two steps."""

    def __init__(self) -> None:
        self.steady = threading.Lock()  # held while weights change
        self._heads: Sequence[nn.Module] = ()
        self._at: tuple[str, int, int] = ("", 0, 0)

    def begin(self, title: str, heads: Sequence[nn.Module], steps: int) -> None:
        """Show heads that will take so many steps."""
        with self.steady:
            self._heads, self._at = heads, (title, 0, steps)

    def stepped(self) -> None:
        """Count a step; the caller holds `steady`."""
        title, step, steps = self._at
        self._at = title, step + 1, steps

    def copy(self) -> tuple[list[nn.Module], str]:
        """Return copies of the heads, in evaluation mode, and how far they are: none before their first step."""
        with self.steady:
            title, step, steps = self._at
            heads = [deepcopy(head).eval() for head in self._heads] if step else []
            return heads, f"{title} at step {step:,} of {steps:,}"


class Setting(NamedTuple):
    """The context of a probe: everything that it needs apart from the samples."""

    config: EvaluationConfig
    classes: int
    encoder_heads: int  # of attention
    seed: int  # of a probe's weights and of its order
    ranks: Ranks
    pulse: Pulse
    caution: Callable[[str], None] = lambda text: None  # told what speaks against taking the result as it is
    live: Live | None = None  # shown the heads in training, if these are asked for before their end


@dataclass(frozen=True)
class EncodedBatch:
    """Samples whose features are known; used in place of a PackedBatch."""

    keys: list[str]
    features_SD: Tensor
    labels: Tensor  # int64 [S]
    skipped: tuple = ()

    def to(self, device: torch.device, non_blocking: bool = False) -> EncodedBatch:
        features_SD, labels = (t.to(device, non_blocking=non_blocking) for t in (self.features_SD, self.labels))
        return EncodedBatch(self.keys, features_SD, labels, self.skipped)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        self.features_SD.record_stream(stream)
        self.labels.record_stream(stream)


@dataclass(frozen=True)
class CachedSteps:
    """Steps of a shuffled stream over features: an epoch is a permutation of all samples, and a step may span two."""

    features: FeatureBank
    steps: range
    batch: int  # samples of a step
    seed: int

    def __iter__(self) -> Iterator[EncodedBatch]:
        samples = len(self.features.keys)
        order = lru_cache(maxsize=1)(partial(permutation, samples, self.seed))  # of an epoch
        for step in self.steps:
            places = (divmod(position, samples) for position in range(step * self.batch, (step + 1) * self.batch))
            rows = [int(order(epoch)[place]) for epoch, place in places]
            keys = [self.features.keys[row] for row in rows]
            yield EncodedBatch(keys, self.features.features_RD[rows], self.features.labels[rows])


class ProbeEngine:
    """See `engine.interface.Engine`; only the head is trained.

    BatchNorm's statistics are those of a whole step, as in the official code. So every rank takes the same step, on
    the features of all. Without a `model`, the frozen encoder, batches are EncodedBatches of whole steps, the same on
    every rank.
    """

    optimizer_name = "LARS"
    memory = ""
    model: nn.Module

    def __init__(
        self,
        head: LinearProbeHead,
        config: LinearProbeConfig,
        ranks: Ranks,
        model: MultimodalEncoder | None,
        encode: EncodeConfig,
    ) -> None:
        self.before_update: Callable[[], None] = lambda: None
        self.kinds: Kinds = {name: ("momentum",) for name, _ in head.named_parameters()}
        self.model, self.ranks, self.frozen, self.encode = head, ranks, model, encode
        self.lars = LARS(head.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)
        for p in head.parameters():
            self.lars.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def step(self, batches: Sequence, counts: float, lr: float) -> tuple[list[ClassLosses], Tensor]:
        features_SD, labels_S = self._gathered(batches)
        self.before_update()  # a forward pass changes BatchNorm's statistics
        self.model.train()
        self.lars.zero_grad()
        if len(labels_S) == 0:  # nothing could be read
            zero = features_SD.new_zeros(())
            return [ClassLosses(zero, zero)], zero
        logits_SK = self.model(features_SD)
        loss = F.cross_entropy(logits_SK, labels_S)
        loss.backward()
        accuracy = (logits_SK.argmax(1) == labels_S).float().mean()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        for group in self.lars.param_groups:
            group["lr"] = lr
        self.lars.step()
        return [ClassLosses(loss.detach(), accuracy)], norm

    def _gathered(self, batches: Sequence) -> tuple[Tensor, Tensor]:
        """Return features and labels of the whole step, in the order of the stream."""
        labels = [batch.labels for batch in batches]
        if self.frozen is None:
            return torch.cat([batch.features_SD for batch in batches]), torch.cat(labels)
        with encoding(self.frozen, self.encode.precision, self.ranks.device):
            features = [self.frozen.pooled(batch, self.encode.pool) for batch in batches]
        if self.ranks.world > 1:
            own = [(part_SD.cpu(), part_S.cpu()) for part_SD, part_S in zip(features, labels)]
            turns = [part for turn in zip(*self.ranks.gather(own)) for part in turn]
            features, labels = ([t.to(self.ranks.device) for t in column] for column in zip(*turns))
        return torch.cat(features), torch.cat(labels)

    def evaluate(self, batch: PackedBatch) -> Tensor:
        raise NotImplementedError("held-out features are encoded once, before the first step")

    def whole(self, kind: str) -> dict[str, Tensor]:
        raise NotImplementedError("every rank has the whole head")

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
