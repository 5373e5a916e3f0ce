"""Benchmark of the peak memory of a training step, without parameters, gradients and optimiser state. Each
implementation runs in its own process."""

from benchmarks import results
from benchmarks.alone import Alone
from benchmarks.implementations import BASELINES

MOST = 0.6  # maximum memory relative to the memory of the expert


def test_memory(benchmark):
    def peak(name: str) -> int:
        with Alone(name, {"size": "small", "image_size": 224}, samples) as process:
            return process.peak_bytes()

    samples = 32
    peaks = {name: peak(name) for name in BASELINES}
    peaks["engine"] = benchmark.pedantic(peak, ("engine",), rounds=1)
    rows = []
    for name, size in peaks.items():
        row = {"size": "small", "batch": samples, "implementation": name}
        rows.append(row | {"MB": size / 1e6, "relative to the expert": size / peaks["expert"]})
    benchmark.extra_info |= {f"{name} MB": size / 1e6 for name, size in peaks.items()}
    results.write(
        "memory", "Peak memory of a training step in addition to parameters, gradients and optimiser state", rows
    )
    assert peaks["engine"] <= MOST * peaks["expert"], peaks
