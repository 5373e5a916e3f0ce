"""Peak memory of a training step above parameters, gradients and optimiser state; each contender in its own process."""

from benchmarks import results
from benchmarks.alone import Alone
from benchmarks.contenders import NAMES

MOST = 0.6  # of the expert's


def test_memory(benchmark):
    def peak(name: str) -> int:
        with Alone(name, {"size": "small", "image_size": 224}, samples) as contender:
            return contender.peak_bytes()

    samples = 32
    peaks = {name: peak(name) for name in NAMES[:2]}
    peaks["engine"] = benchmark.pedantic(peak, ("engine",), rounds=1)
    rows = []
    for name, size in peaks.items():
        row = {"size": "small", "batch": samples, "implementation": name}
        rows.append(row | {"MB": size / 1e6, "of the expert's": size / peaks["expert"]})
    benchmark.extra_info |= {f"{name} MB": size / 1e6 for name, size in peaks.items()}
    results.write("memory", "Peak memory of a training step above parameters, gradients and optimiser state", rows)
    assert peaks["engine"] <= MOST * peaks["expert"], peaks
