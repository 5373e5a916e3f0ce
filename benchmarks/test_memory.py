"""Peak memory of a training step above parameters, gradients and optimiser state; each contender in its own process."""

from benchmarks import results
from benchmarks.alone import measure
from benchmarks.contenders import NAMES

MOST = 0.6  # of the expert's


def test_memory(benchmark):
    model, samples = {"size": "small", "image_size": 224}, 32
    alone = {name: measure(name, model, samples, rounds=1) for name in NAMES[:2]}
    alone["engine"] = benchmark.pedantic(measure, ("engine", model, samples), {"rounds": 1}, rounds=1)
    peaks = {name: alone[name].peak_bytes for name in NAMES}
    rows = []
    for name, peak in peaks.items():
        row = {"size": "small", "batch": samples, "implementation": name}
        rows.append(row | {"MB": peak / 1e6, "of the expert's": peak / peaks["expert"]})
    benchmark.extra_info |= {f"{name} MB": peak / 1e6 for name, peak in peaks.items()}
    results.write("memory", "Peak memory of a training step above parameters, gradients and optimiser state", rows)
    assert peaks["engine"] <= MOST * peaks["expert"], peaks
