"""Seconds from launch to the end of the first training step: imports, model, compilation, and with its cache filled."""

import tempfile

from benchmarks import results
from benchmarks.alone import measure

MODEL, SAMPLES = {"size": "small", "image_size": 224}, 2  # a step itself takes little


def test_startup(benchmark):
    rows = []
    for name in ("expert", "engine"):
        with tempfile.TemporaryDirectory() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache}
            cold = measure(name, MODEL, SAMPLES, rounds=1, env=env).startup
            if name == "expert":
                warm = measure(name, MODEL, SAMPLES, rounds=1, env=env).startup
            else:
                options = {"rounds": 1, "env": env}
                warm = benchmark.pedantic(measure, (name, MODEL, SAMPLES), options, rounds=1).startup
            rows.append({"implementation": name, "first launch, s": cold, "next launch, s": warm})
    results.write("startup", "Launch to first step, compilation included (small, batch 2)", rows)
    expert, engine = rows
    assert engine["first launch, s"] < expert["first launch, s"]
