"""Comparison of training steps with the options for faster pre-training and with the default config; cost of Muon."""

import statistics
from contextlib import ExitStack

import torch

from benchmarks import results
from benchmarks.alone import Alone
from benchmarks.workload import make_batch, make_config
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.engine.muon import orthogonalisation_flops
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE

SMALL = {"size": "small", "image_size": 224}
CROSS = SMALL | {"dec_attention": "cross"}
THIRD = {"image_predicted": 0.33, "text_predicted": 0.33}
ARMS = {  # model, masking, optimiser
    "default": (SMALL, {}, {}),
    "cross-attention, a third of the masked positions predicted": (CROSS, THIRD, {}),
    "the same with Muon": (CROSS, THIRD, {"name": "muon"}),
}
DEFAULT, CHEAP, FAST = ARMS
BATCH, BATCHES = 32, (32, 256, 4096)  # batch size whose time is measured; batch sizes whose FLOPs are predicted
ROUNDS = 5
MOST = 0.6  # maximum time relative to the time of the default config, with AdamW


def test_faster(benchmark):
    with ExitStack() as stack:
        alone = {
            name: stack.enter_context(Alone("engine", model, BATCH, masking=masking, optim=optim))
            for name, (model, masking, optim) in ARMS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in ARMS}

        def others() -> None:
            for name in (DEFAULT, CHEAP):
                seconds[name].append(alone[name].step())

        benchmark.pedantic(lambda: seconds[FAST].append(alone[FAST].step()), setup=others, rounds=ROUNDS)
    # consecutive steps are subject to the same load of the machine
    ratios = {
        name: statistics.median(own / usual for own, usual in zip(seconds[name], seconds[DEFAULT])) for name in ARMS
    }
    flops = {name: step_flops(name, BATCH) for name in ARMS}
    rows = [
        {
            "config": name,
            "batch": BATCH,
            "samples/s": BATCH / statistics.median(seconds[name]),
            "time relative to the default": ratios[name],
            "FLOPs relative to the default": flops[name][0] / flops[DEFAULT][0],
            "FLOPs with Newton-Schulz, relative to the default": sum(flops[name]) / flops[DEFAULT][0],
        }
        for name in ARMS
    ]
    results.write("faster", "Training step of the small model at 224 px with the options for faster pre-training", rows)
    measured = statistics.median(muon - adamw for muon, adamw in zip(seconds[FAST], seconds[CHEAP]))
    with_options = "with cross-attention and a third of the masked positions predicted"
    results.write("muon", f"Cost of Muon in a step of the small model at 224 px {with_options}", muon_rows(measured))
    benchmark.extra_info |= {f"time of {name}, relative to the default": ratio for name, ratio in ratios.items()}
    assert ratios[CHEAP] <= MOST, ratios


def step_flops(name: str, samples: int) -> tuple[float, float]:
    """Return the FLOPs of the forward and backward passes of a step, and of its Newton-Schulz iterations."""
    model, masking, optim = ARMS[name]
    config = make_config(ModelConfig(**model), BATCH, masking=MaskingConfig(**masking))
    with torch.device("meta"):
        matrices = M3AE(config.model, config.loss).hidden_matrices()
    packed, _ = make_batch(config, BATCH)
    passes = executed_flops(config.model, packed) * samples / BATCH
    return passes, orthogonalisation_flops(matrices) if optim else 0


def muon_rows(measured: float) -> list[results.Row]:
    """Return a row for each batch size. `measured`: additional seconds per step with Muon compared with AdamW, at batch
    size BATCH."""
    rows: list[results.Row] = []
    for samples in BATCHES:
        passes, iterations = step_flops(FAST, samples)
        row: results.Row = {
            "batch": samples,
            "GFLOP of forward and backward": passes / 1e9,
            "GFLOP of Newton-Schulz": iterations / 1e9,
        }
        part = {"fraction of the step's FLOPs": iterations / (passes + iterations)}
        rows.append(
            row | part | {"additional seconds per step compared with AdamW": measured if samples == BATCH else None}
        )
    return rows
