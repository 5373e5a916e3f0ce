"""Training steps of all compared implementations on the same work: the two baselines (the eager reference and the
hand-optimised "expert") and this engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.reference import ReferenceTrainer
from benchmarks.workload import PRECISION, WORDS, make_batch, make_config
from m3ae_fast.config import MaskingConfig, ModelConfig, OptimConfig
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import Ranks

BASELINES = ("reference", "expert")
NAMES = (*BASELINES, "engine")
LR = 1e-5


def build(
    name: str,
    model: ModelConfig,
    samples: int,
    ranks: Ranks,
    *,
    masking: MaskingConfig | None = None,
    optim: OptimConfig | None = None,
    words: tuple[int, int] = WORDS,
    batches: int = 1,
) -> Callable[[], Tensor]:
    """Return a function that takes one step on a batch of `samples` samples and returns the loss, a 0-d tensor.

    All implementations start from the same parameters and cycle through the same `batches` batches. The expert and the
    engine compute in bf16 if that is faster on the machine.
    """
    config = make_config(model, samples, masking=masking, optim=optim, precision=PRECISION)
    torch.manual_seed(0)
    m3ae = M3AE(config.model, config.loss)
    made = (make_batch(config, samples, seed=seed, words=words) for seed in range(batches))
    pairs = itertools.cycle([[batch.to(ranks.device) for batch in pair] for pair in made])
    if name == "engine":
        m3ae.encoder.compile_blocks()
        m3ae.decoder.compile_blocks()
        engine = build_engine(m3ae, config, ranks)

        def step() -> Tensor:
            packed, _ = next(pairs)
            return engine.step([packed], packed.counts, LR)[0][0].loss.detach()

        return step
    expert = name == "expert"
    trainer = ReferenceTrainer(config, m3ae.state_dict(), ranks.device, expert=expert)
    return lambda: trainer.step(next(pairs)[1], LR)
