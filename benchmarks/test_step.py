"""Benchmarks of whole training steps: of the reference, the expert and the engine, and of the engine with the options
for faster pre-training. The compared processes alternate, so that other load on the machine affects all of them.

On a GPU, the models and the batch size per GPU are those of the shipped configs."""

import statistics
from contextlib import ExitStack

import pytest
import torch

from benchmarks import limit, results
from benchmarks.alone import Alone
from benchmarks.implementations import BASELINES, NAMES
from benchmarks.workload import DEVICE, IMAGE_SIZE, PRECISION, make_batch, make_config
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.engine.muon import orthogonalisation_flops
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE

ROUNDS = 5
CASES = [("small", 32), ("base", 8)]  # model size, batch size
if DEVICE.type == "cuda":
    CASES = [("large", 512), ("base", 512), ("small", 512)]
SMALL = {"size": "small", "image_size": IMAGE_SIZE}
CROSS = SMALL | {"dec_attention": "cross"}
THIRD = {"image_predicted": 0.33, "text_predicted": 0.33}
RECIPES = {  # model, masking, optimiser
    "default": (SMALL, {}, {}),
    "cross-attention, a third of the masked positions predicted": (CROSS, THIRD, {}),
    "the same with Muon": (CROSS, THIRD, {"name": "muon"}),
}
DEFAULT, CHEAP, FAST = RECIPES
BATCH = 32
MOST = 0.6  # maximum time of CHEAP relative to DEFAULT
ROWS: list[results.Row] = []
TITLE = (
    f"Training step, {IMAGE_SIZE} px, captions of 8 to 32 tokens (text length 64); of the limit: time of the engine's "
)
FASTER = f"Training step of the small model at {IMAGE_SIZE} px with the options for faster pre-training"
TITLE += "matrix products at the peak, relative to the measured time; "


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        peaks = f"matmuls reach {peak('fp32') / 1e12:.2f} TFLOP/s in fp32 and {peak('bf16') / 1e12:.2f} TFLOP/s in bf16"
        results.write("step", TITLE + peaks, ROWS)


def peak(precision: str) -> float:
    """Return the FLOP/s of large matmuls on this machine."""
    return limit.peak(DEVICE, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])


def least_speedups() -> tuple[float, float]:
    """Return the minimum speed-ups of the engine over the reference and over the expert on this machine.

    They depend on the speed of bf16 matmuls, because the reference computes in float32.
    """
    if PRECISION == "fp32":
        return 3.0, 1.4
    return (6.0 if peak("bf16") > 3.5 * peak("fp32") else 4.0), 1.6


def start(stack: ExitStack, name: str, model: dict, samples: int) -> Alone | None:
    """Start an implementation; None for a baseline that needs more memory than the machine has."""
    try:
        return stack.enter_context(Alone(name, model, samples))
    except RuntimeError as error:
        if name == "engine":
            raise
        print(f"{name} is left out: {error}")
        return None


@pytest.mark.parametrize(("size", "samples"), CASES)
def test_step(benchmark, size, samples):
    model = {"size": size, "image_size": IMAGE_SIZE}
    with ExitStack() as stack:
        started = {name: start(stack, name, model, samples) for name in NAMES}
        alone = {name: process for name, process in started.items() if process is not None}
        for process in alone.values():
            assert process.losses == pytest.approx(alone["engine"].losses, rel=1e-2), "bf16 compared with float32"
        seconds: dict[str, list[float]] = {name: [] for name in alone}

        def baselines() -> None:
            for name in alone.keys() - {"engine"}:
                seconds[name].append(alone[name].step())

        benchmark.pedantic(lambda: seconds["engine"].append(alone["engine"].step()), setup=baselines, rounds=ROUNDS)

    config = make_config(ModelConfig(**model), samples)
    least = executed_flops(config.model, make_batch(config, samples)[0]) / peak(PRECISION)
    ratios = {}
    for name in alone:
        # consecutive steps are subject to the same load of the machine
        ratios[name] = statistics.median(r / e for r, e in zip(seconds[name], seconds["engine"]))
        precision = "fp32" if name == "reference" else PRECISION
        row: results.Row = {"size": size, "batch": samples, "implementation": name, "precision": precision}
        row["samples/s"] = samples / statistics.median(seconds[name])
        row["speed-up of the engine"] = ratios[name]
        row["best samples/s"] = samples / min(seconds[name])
        row["of the limit"] = least / statistics.median(seconds[name])
        ROWS.append(row)
    benchmark.extra_info |= {f"speed-up over {name}": ratios[name] for name in BASELINES if name in ratios}
    if DEVICE.type == "cpu" and size == "small":
        reference, expert = least_speedups()
        assert ratios["reference"] >= reference and ratios["expert"] >= expert, ratios


def test_faster_recipe(benchmark):
    with ExitStack() as stack:
        alone = {
            name: stack.enter_context(Alone("engine", model, BATCH, masking=masking, optim=optim))
            for name, (model, masking, optim) in RECIPES.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in RECIPES}

        def others() -> None:
            for name in (DEFAULT, CHEAP):
                seconds[name].append(alone[name].step())

        benchmark.pedantic(lambda: seconds[FAST].append(alone[FAST].step()), setup=others, rounds=ROUNDS)
    # consecutive steps are subject to the same load of the machine
    ratios = {
        name: statistics.median(own / usual for own, usual in zip(seconds[name], seconds[DEFAULT])) for name in RECIPES
    }
    flops = {name: step_flops(name, BATCH) for name in RECIPES}
    rows: list[results.Row] = [
        {
            "config": name,
            "batch": BATCH,
            "samples/s": BATCH / statistics.median(seconds[name]),
            "time relative to the default": ratios[name],
            "FLOPs relative to the default": flops[name][0] / flops[DEFAULT][0],
            "FLOPs with Newton-Schulz, relative to the default": sum(flops[name]) / flops[DEFAULT][0],
        }
        for name in RECIPES
    ]
    results.write("faster", FASTER, rows)
    benchmark.extra_info |= {f"time of {name}, relative to the default": ratio for name, ratio in ratios.items()}
    assert ratios[CHEAP] <= MOST, ratios


def step_flops(name: str, samples: int, image_size: int = IMAGE_SIZE) -> tuple[float, float]:
    """Return the FLOPs of the forward and backward passes of a step, and of its Newton-Schulz iterations."""
    model, masking, optim = RECIPES[name]
    config = make_config(ModelConfig(**model | {"image_size": image_size}), BATCH, masking=MaskingConfig(**masking))
    with torch.device("meta"):
        matrices = M3AE(config.model, config.loss).hidden_matrices()
    packed, _ = make_batch(config, BATCH)
    passes = executed_flops(config.model, packed) * samples / BATCH
    return passes, orthogonalisation_flops(matrices) if optim else 0
