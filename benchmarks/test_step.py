"""Benchmark of whole training steps of the reference, the expert and the engine. They alternate, so that other load on
the machine affects all of them."""

import functools
import statistics
from contextlib import ExitStack

import pytest
import torch

from benchmarks import results
from benchmarks.alone import Alone
from benchmarks.implementations import BASELINES, NAMES
from benchmarks.workload import DEVICE, PRECISION
from m3ae_fast.base.hardware import peak_flops

ROUNDS = 5
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        peaks = f"matmuls reach {peak('fp32') / 1e12:.2f} TFLOP/s in fp32 and {peak('bf16') / 1e12:.2f} TFLOP/s in bf16"
        results.write("step", f"Training step, 224 px, captions of 8 to 32 tokens (text length 64); {peaks}", ROWS)


@functools.cache
def peak(precision: str) -> float:
    """Return the FLOP/s of large matmuls on this machine."""
    return peak_flops(DEVICE, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])


def least() -> tuple[float, float]:
    """Return the minimum speed-ups of the engine over the reference and over the expert on this machine.

    They depend on the speed of bf16 matmuls, because the reference computes in float32.
    """
    if PRECISION == "fp32":
        return 3.0, 1.4
    return (6.0 if peak("bf16") > 3.5 * peak("fp32") else 4.0), 1.6


@pytest.mark.parametrize(("size", "samples"), [("small", 32), ("base", 8)])
def test_step(benchmark, size, samples):
    with ExitStack() as stack:
        alone = {n: stack.enter_context(Alone(n, {"size": size, "image_size": 224}, samples)) for n in NAMES}
        for name in NAMES[1:]:
            assert alone[name].losses == pytest.approx(alone["reference"].losses, rel=1e-2), (
                "bf16 compared with float32"
            )
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}

        def baselines() -> None:
            for name in BASELINES:
                seconds[name].append(alone[name].step())

        benchmark.pedantic(lambda: seconds["engine"].append(alone["engine"].step()), setup=baselines, rounds=ROUNDS)

    ratios = {}
    for name in NAMES:
        # consecutive steps are subject to the same load of the machine
        ratios[name] = statistics.median(r / e for r, e in zip(seconds[name], seconds["engine"]))
        precision = "fp32" if name == "reference" else PRECISION
        row = {"size": size, "batch": samples, "implementation": name, "precision": precision}
        row["samples/s"] = samples / statistics.median(seconds[name])
        row["speed-up of the engine"] = ratios[name]
        row["best samples/s"] = samples / min(seconds[name])
        ROWS.append(row)
    benchmark.extra_info |= {f"speed-up over {name}": ratios[name] for name in BASELINES}
    if size == "small":
        reference, expert = least()
        assert ratios["reference"] >= reference and ratios["expert"] >= expert, ratios
