"""The engine on a GPU: the official results, the losses of the CPU with every ZeRO stage, and no wait for the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from m3ae_fast.batch import pack
from m3ae_fast.cli.verify import main as verify
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training.loss_watch import LossWatch
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT
from tests.helpers.zero_cases import TINY, samples

GOLDEN = sorted((ROOT / "tests/golden").glob("*.npz"))


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


@pytest.mark.gpu(seconds=300)
@pytest.mark.parametrize(
    "deepspeed",
    [None, {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}}],
    ids=["torch", "zero-1", "zero-2"],
)
def test_a_step_never_waits_for_the_gpu(deepspeed):
    steps_without_waiting(deepspeed, "bf16")


@pytest.mark.gpu(seconds=300)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_official_results_are_reproduced(path):
    assert verify([str(path), "--device", "cuda"]) == 0


def curves(file: Path, env: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the loss and the gradient norm of each step of every case: each precision and ZeRO stage."""
    command = [sys.executable, "-m", "tests.helpers.zero_cases", "matrix", str(file)]
    subprocess.run(command, cwd=ROOT, env=environment() | env, check=True)
    return {name: np.array(curve) for name, curve in map(json.loads, file.read_text().splitlines())}


@pytest.mark.gpu(seconds=900)
def test_every_zero_stage_has_the_losses_of_plain_torch_on_the_cpu(tmp_path):
    found = curves(tmp_path / "gpu", {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")})
    expected = curves(tmp_path / "cpu", {"CUDA_VISIBLE_DEVICES": ""})
    assert found.keys() == expected.keys() and len(found) == 20
    for name, curve in found.items():
        tolerance = 1e-4 if name.startswith("fp32") else 2e-2
        np.testing.assert_allclose(curve, expected[name], rtol=tolerance, err_msg=name)
