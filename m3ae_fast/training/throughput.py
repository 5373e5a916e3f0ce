"""Counts of the samples and tokens of a step, the throughput computed from them, and the forward time of this rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from m3ae_fast.batch.packed import LossCounts, PackedBatch
from m3ae_fast.config import Config, MaskingConfig, ModelConfig
from m3ae_fast.engine.muon import orthogonalisation_flops
from m3ae_fast.model.flops import executed_flops, reference_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.training.device_clock import DeviceClock


class Rates(Protocol):
    """Measurement of rates between two log lines."""

    def add(self, counts: Any, waited: float) -> None:
        """Add the counts of a step over all ranks, and the seconds that this rank waited for its data."""

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call: `samples_per_s`, `data_wait`, and others that the task logs.
        `data_wait` is the fraction of the time that this rank waited for data; the maximum over ranks is logged."""


class SampleCounts(NamedTuple):
    """Counts of micro-batches, for tasks whose loss is a mean over samples."""

    samples: float
    skipped: float  # samples that could not be used

    @classmethod
    def of(cls, batches: Sequence[PackedBatch]) -> SampleCounts:
        """Return the counts of `batches`."""
        return cls(sum(len(batch.keys) for batch in batches), sum(len(batch.skipped) for batch in batches))

    def denominators(self, world: int) -> float:
        """Return each rank's loss denominator, given counts summed over `world` ranks; 0 if there are no samples."""
        return self.samples / world


class SampleRate:
    """Measurement of samples per second between two log lines."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._samples, self._waited, self._since = 0.0, 0.0, time.perf_counter()

    def add(self, counts: SampleCounts, waited: float) -> None:
        """Add the counts of a step over all ranks, and the seconds that this rank waited for its data."""
        self._samples += counts.samples
        self._waited += waited

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call; see `Rates`."""
        seconds = time.perf_counter() - self._since
        rates = {"samples_per_s": self._samples / seconds, "data_wait": self._waited / seconds}
        self._start()
        return rates


class StepCounts(NamedTuple):
    """Counts of micro-batches. The sums of counts over ranks are also stored as StepCounts."""

    samples: float
    images: float
    captions: float
    loss_image: float  # denominator of the image loss
    loss_text: float  # denominator of the text loss
    skipped: float  # samples that could not be used
    tokens: float  # cls tokens, visible tokens, and masked tokens in the decoder
    # images, or with native aspect ratio their patches; an image that several samples share is counted once
    crops: float
    flops: float  # executed FLOPs, forward and backward

    def denominators(self, world: int) -> LossCounts:
        """Return each rank's loss denominators, given counts summed over `world` ranks."""
        return LossCounts(self.loss_image / world, self.loss_text / world)

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], config: ModelConfig) -> StepCounts:
        """Return the counts of `batches`, which must be on the CPU."""
        each = []
        for b in batches:
            samples = len(b.keys), len(b.grids), b.captions
            flops = executed_flops(config, b) if b.flops is None else b.flops
            each.append((*samples, *b.counts, len(b.skipped), _tokens(b), len(b.images), flops))
        return cls(*map(sum, zip(*each)))


Counts: TypeAlias = SampleCounts | StepCounts


def _tokens(batch: PackedBatch) -> int:
    """Return the number of tokens without padding. A token that encoder and decoder process is counted once."""
    visible = int(batch.encoder.cu_seqlens[len(batch.keys)])
    return visible + int((batch.mask_ids >= 0).sum())


def newton_schulz_flops(config: Config, model: M3AE, world: int) -> float:
    """Return the FLOPs per rank of the Newton-Schulz iterations in a step; 0 if the optimiser is not Muon. From ZeRO
    stage 1 on, each of the `world` ranks orthogonalises only its part of the matrices."""
    if config.optim.name != "muon":
        return 0.0
    sharded = config.zero is not None and config.zero.stage > 0
    return orthogonalisation_flops(model.hidden_matrices()) / (world if sharded else 1)


class Throughput:
    """Measurement of throughput and utilisation between two log lines."""

    def __init__(
        self,
        config: ModelConfig,
        masking: MaskingConfig,
        peak_flops: float,
        update_flops: float = 0.0,
        teacher_flops: float = 0.0,
    ) -> None:
        """Start counting. `peak_flops`: FLOP/s of all ranks together; `update_flops`: FLOPs of the optimiser in a step,
        on all ranks together; `teacher_flops`: FLOPs of the teacher for an image."""
        self._peak, self._update_flops, self._teacher_flops = peak_flops, update_flops, teacher_flops
        all_predicted = masking.image_predicted == masking.text_predicted == 1
        # the FLOPs of the official code are compared only with runs that compute the same as that code
        self._is_official = config.resize == "square" and config.dec_attention == "self" and all_predicted
        self._paired = reference_flops(config, masking)
        self._image, self._text = (reference_flops(config, masking, **{n: False}) for n in ("text", "image"))
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._waited, self._steps = 0.0, 0
        self._counts = StepCounts(*[0] * len(StepCounts._fields))

    def add(self, counts: StepCounts, waited: float) -> None:
        """Add the counts of a step over all ranks, and the seconds that this rank waited for its data."""
        self._counts = StepCounts(*(a + b for a, b in zip(self._counts, counts)))
        self._steps += 1
        self._waited += waited

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call: those of `Rates`, `tokens_per_s`, `utilisation` and, if the run
        computes what the official code computes (square images, a decoder with self-attention, all masked tokens
        predicted), `mfu`. `utilisation` is the executed FLOP/s, including those of the optimiser and of the
        teacher, divided by the peak FLOP/s; `mfu` is computed with the FLOPs of the official code instead."""
        seconds, n = time.perf_counter() - self._since, self._counts
        paired = n.images + n.captions - n.samples
        reference = paired * self._paired + (n.samples - n.captions) * self._image + (n.samples - n.images) * self._text
        executed = n.flops + n.crops * self._teacher_flops + self._steps * self._update_flops
        rates = {
            "samples_per_s": n.samples / seconds,
            "tokens_per_s": n.tokens / seconds,
            # computed with the FLOPs of the official code
            **({"mfu": reference / seconds / self._peak} if self._is_official else {}),
            # computed with the executed FLOPs
            "utilisation": executed / seconds / self._peak,
            "data_wait": self._waited / seconds,
        }
        self._start()
        return rates


class ForwardTime:
    """Measurement of the duration of forward passes in training, which identifies slow ranks. The duration of a whole
    step would not: it is the same on all ranks, because backward passes wait for other ranks."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._passes: list[tuple[Any, Any]] = []
        self._clock = DeviceClock(device)
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def per_step(self, steps: int) -> float:
        """Return the seconds per step since the last call, given the number of `steps` since then. The GPU must have
        completed these steps."""
        passes = [each for each in self._passes if each[1] is not None]
        self._passes = []
        return sum(self._clock.seconds(begun, ended) for begun, ended in passes) / steps

    def _begin(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self._passes.append((self._clock.now(), None))

    def _end(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self._passes[-1] = (self._passes[-1][0], self._clock.now())
