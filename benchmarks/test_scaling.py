"""Benchmark of the cost of a step by batch size, vocabulary, text length and mask ratio, varied one at a time."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest

from benchmarks import results
from benchmarks.alone import Alone

SMALL = {"size": "small", "image_size": 224}
BATCH = 16  # batch size while other sizes are varied
SERIES = {
    "batch": [(n, {"samples": n}) for n in (8, 16, 32, 64, 128)],
    "vocabulary": [(v, {"model": SMALL | {"vocab_size": v}}) for v in (1_000, 8_000, 30_522, 60_000)],
    # all captions have the maximum length
    "text length": [(n, {"model": SMALL | {"text_length": n}, "words": (n, n)}) for n in (16, 64, 256)],
    "mask ratio": [(r, {"masking": {"image_ratio": r, "text_ratio": r}}) for r in (0.25, 0.5, 0.75, 0.9)],
}
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if not ROWS:
        return
    results.write(
        "scaling",
        f"Speed and memory of the engine as one quantity varies (small model, 224 px, batch {BATCH} unless varied)",
        ROWS,
    )
    draw(ROWS)


def draw(rows: list[results.Row]) -> None:
    """Plot speed and memory to scaling.png."""
    figure, axes = plt.subplots(2, len(SERIES), figsize=(3.2 * len(SERIES), 5), squeeze=False)
    for column, what in enumerate(SERIES):
        mine = [row for row in rows if row["quantity"] == what]
        values = [float(row["value"]) for row in mine]
        names = {"samples/s": "throughput (samples/s)", "peak MB": "peak memory (MB)"}
        for line, (quantity, name) in enumerate(names.items()):
            axis = axes[line][column]
            axis.plot(values, [row[quantity] for row in mine], marker="o")
            axis.set(xlabel=what, ylabel="" if column else name, xscale="linear" if "ratio" in what else "log")
            axis.set_xticks(values, [row["value"] for row in mine])
            axis.minorticks_off()
            axis.tick_params(axis="x", labelsize=7)
            axis.set_ylim(bottom=0, top=1.1 * axis.get_ylim()[1])
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(results.here() / "scaling.png", dpi=110)
    plt.close(figure)


@pytest.mark.parametrize("what", SERIES)
def test_scaling(benchmark, what):
    def run() -> None:
        for value, change in SERIES[what]:
            spec = {"model": SMALL, "samples": BATCH} | change
            with Alone("engine", **spec) as engine:
                speed = spec["samples"] / statistics.median(engine.step() for _ in range(3))
                row = {"quantity": what, "value": str(value), "samples/s": speed, "peak MB": engine.peak_bytes() / 1e6}
                ROWS.append(row)

    benchmark.pedantic(run, rounds=1)
    peaks = [row["peak MB"] for row in ROWS if row["quantity"] == what]
    if what == "batch":
        assert peaks[-1] < 1.1 * 2 * peaks[-2], "memory grows faster than the batch size"
    if what == "vocabulary":
        assert peaks[-1] < 2 * peaks[0], "memory grows with the vocabulary as if complete logits were stored"
