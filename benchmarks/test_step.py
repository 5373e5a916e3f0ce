"""Whole training steps side by side: reference, expert, engine, taking turns so that a busy machine meets all alike."""

import statistics
from contextlib import ExitStack

import pytest

from benchmarks import results
from benchmarks.alone import Alone
from benchmarks.contenders import NAMES
from benchmarks.workload import PRECISION

ROUNDS = 5
# ratios of the engine's speed to (reference, expert); in float32 one matmul peak binds all three
LEAST = {"bf16": (6.0, 1.6), "fp32": (3.0, 1.4)}
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        results.write("step", "Training step, 224 px, captions of 8 to 32 of 64 tokens", ROWS)


@pytest.mark.parametrize(("size", "samples"), [("small", 32), ("base", 8)])
def test_step(benchmark, size, samples):
    with ExitStack() as stack:
        alone = {n: stack.enter_context(Alone(n, {"size": size, "image_size": 224}, samples)) for n in NAMES}
        for name in NAMES[1:]:
            assert alone[name].losses == pytest.approx(alone["reference"].losses, rel=1e-2), "bf16 beside float32"
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}

        def rivals() -> None:
            for name in NAMES[:2]:
                seconds[name].append(alone[name].step())

        benchmark.pedantic(lambda: seconds["engine"].append(alone["engine"].step()), setup=rivals, rounds=ROUNDS)

    ratios = {}
    for name in NAMES:
        # neighbours in time share what else the machine does
        ratios[name] = statistics.median(r / e for r, e in zip(seconds[name], seconds["engine"]))
        precision = "fp32" if name == "reference" else PRECISION
        row = {"size": size, "batch": samples, "implementation": name, "precision": precision}
        row["samples/s"] = samples / statistics.median(seconds[name])
        row["the engine's speed-up"] = ratios[name]
        row["best samples/s"] = samples / min(seconds[name])
        ROWS.append(row)
    benchmark.extra_info |= {f"speed-up over {name}": ratios[name] for name in NAMES[:2]}
    if size == "small":
        reference, expert = LEAST[PRECISION]
        assert ratios["reference"] >= reference and ratios["expert"] >= expert, ratios
