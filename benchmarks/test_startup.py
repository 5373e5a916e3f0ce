"""Benchmark of the time from launch to the end of the first training step (imports, model, compilation), without and
with a filled compilation cache."""

import tempfile

from benchmarks import results
from benchmarks.alone import Alone

MODEL, SAMPLES = {"size": "small", "image_size": 224}, 2  # so that a step takes little time


def launch(name: str, cache: str) -> float:
    with Alone(name, MODEL, SAMPLES, env={"TORCHINDUCTOR_CACHE_DIR": cache}) as process:
        return process.startup


def test_startup(benchmark):
    rows = []
    for name in ("expert", "engine"):
        with tempfile.TemporaryDirectory() as cache:
            cold = launch(name, cache)
            engine = name == "engine"
            warm = benchmark.pedantic(launch, (name, cache), rounds=1) if engine else launch(name, cache)
            rows.append({"implementation": name, "first launch, s": cold, "next launch, s": warm})
    results.write("startup", "Time from launch to first step, including compilation (small model, batch 2)", rows)
    expert, engine = rows
    assert engine["first launch, s"] < expert["first launch, s"]
