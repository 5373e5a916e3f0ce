"""Whole training steps side by side: reference, expert, engine, taking turns so that a busy machine meets all alike."""

import statistics
import time

import pytest

from benchmarks import results
from benchmarks.contenders import NAMES, build
from m3ae_fast.config import ModelConfig

ROUNDS = 5
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        results.write("step", "Training step, 224 px, captions of 8 to 32 of 64 tokens", ROWS)


# least ratio of the engine's speed to (reference, expert)
@pytest.mark.parametrize(("size", "samples", "least"), [("small", 32, (6.0, 1.6)), ("base", 8, (4.0, 1.3))])
def test_step(benchmark, ranks, size, samples, least):
    model = ModelConfig(size=size, image_size=224)
    steps = {name: build(name, model, samples, ranks) for name in NAMES}
    first = {name: [step().item() for _ in range(2)] for name, step in steps.items()}  # compiles
    for name in ("expert", "engine"):
        assert first[name] == pytest.approx(first["reference"], rel=1e-2), "bf16 beside float32"

    seconds: dict[str, list[float]] = {name: [] for name in NAMES}

    def timed(name: str) -> None:
        start = time.perf_counter()
        steps[name]().item()
        seconds[name].append(time.perf_counter() - start)

    def rivals() -> None:
        timed("reference")
        timed("expert")

    benchmark.pedantic(timed, ("engine",), setup=rivals, rounds=ROUNDS)

    ratios = {}
    for name in NAMES:
        # neighbours in time share what else the machine does
        ratios[name] = statistics.median(r / e for r, e in zip(seconds[name], seconds["engine"]))
        row = {"size": size, "batch": samples, "implementation": name}
        row["samples/s"] = samples / statistics.median(seconds[name])
        row["the engine's speed-up"] = ratios[name]
        row["best samples/s"] = samples / min(seconds[name])
        ROWS.append(row)
    benchmark.extra_info |= {f"speed-up over {name}": ratios[name] for name in NAMES[:2]}
    assert ratios["reference"] >= least[0] and ratios["expert"] >= least[1], ratios
