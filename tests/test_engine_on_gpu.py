"""Tests of the engine that require a GPU. tests/rehearsal executes the tested code without a GPU."""

import pytest
import torch

from m3ae_fast.batch import pack
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training.loss_watch import LossWatch
from tests.helpers.zero_cases import TINY, samples


def steps_without_waiting(deepspeed: dict | None, precision: str) -> None:
    """Check that in several steps on changing batches, the host waits for the GPU only in the first step."""
    data = {
        "model": TINY,
        "data": {"train": [{"shards": "none.tar"}]},
        "optim": {"clip_grad": 1.0},
        "train": {"steps": 3, "global_batch": 16, "precision": precision},
        "deepspeed": deepspeed,
    }
    config = parse(Config, data, "case")
    with join_ranks() as ranks:
        engine = build_engine(M3AE(config.model, config.loss), config, ranks)
        watch = LossWatch()
        batches = [pack(samples(step, text=True), engine.model.geometry) for step in range(4)]
        moved = [batch.to(ranks.device) for batch in batches]
        for step, batch in enumerate(moved):
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                losses, norm = engine.step([batch], batch.counts, 1e-3)
                watch.add(step, batch.keys, losses, norm)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert watch.first_bad() == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose host could wait")
@pytest.mark.parametrize(
    "deepspeed",
    [None, {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}}],
    ids=["torch", "zero-1", "zero-2"],
)
def test_a_step_never_waits_for_the_gpu(deepspeed):
    steps_without_waiting(deepspeed, "bf16")
