"""Charts of logged metrics, with several curves per chart."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
_TRAIN, _HELD_OUT, _OTHER = "#9db4d3", "#1f4e9c", "#b5651d"


class Line(NamedTuple):
    """A metric in a chart."""

    metric: str
    label: str
    colour: str  # colour of the curve if there is a single run


class Chart(NamedTuple):
    """A chart of related metrics."""

    title: str
    unit: str
    lines: Sequence[Line]


def _both(title: str, unit: str, metric: str) -> Chart:
    return Chart(title, unit, [Line(metric, "training", _TRAIN), Line(f"val_{metric}", "held-out", _HELD_OUT)])


LEARNING = (
    Chart("Training loss", "weighted sum of the losses", [Line("loss", "training", _TRAIN)]),
    _both("Image loss", "loss", "image_loss"),
    _both("Text loss", "nats per token", "text_loss"),
    _both("Text accuracy", "fraction correct", "text_accuracy"),
    Chart(
        "k-NN accuracy of the features",
        "fraction correct",
        [Line("val_knn_largest_class", "largest class", _OTHER), Line("val_knn_top1", "held-out", _HELD_OUT)],
    ),
    Chart("Effective rank of the features", "dimensions (RankMe)", [Line("val_rankme", "held-out", _HELD_OUT)]),
    Chart(
        "Variance of the patch features that positions explain",
        "fraction",
        [Line("val_position_share", "held-out", _HELD_OUT)],
    ),
    Chart(
        "Held-out loss relative to a constant prediction",
        "ratio of losses",
        [Line("val_image_relative", "image", _HELD_OUT), Line("val_text_relative", "text", _OTHER)],
    ),
)
RUNNING = (
    Chart("Throughput", "throughput (samples/s)", [Line("samples_per_s", "", _OTHER)]),
    Chart(
        "Utilisation of the peak FLOP/s",
        "fraction",
        [Line("mfu", "reference FLOPs", _OTHER), Line("utilisation", "executed FLOPs", _HELD_OUT)],
    ),
    Chart("Time spent waiting for data", "fraction of the time", [Line("data_wait", "", _OTHER)]),
    Chart("Learning rate", "learning rate", [Line("lr", "", _OTHER)]),
    Chart("Gradient norm before clipping", "L2 norm", [Line("grad_norm", "", _OTHER)]),
    Chart("Peak memory", "memory (GB)", [Line("peak_memory_gb", "peak", _OTHER)]),
)


def draw_charts(charts: Sequence[Chart], runs: Mapping[str, Metrics]) -> Iterator[tuple[str, bytes]]:
    """Yield the title and PNG of each chart with at least one point. `runs`: metrics by the name of the run. With
    several runs, only the last metric of each chart is plotted, in one colour per run."""
    from matplotlib.figure import Figure

    for chart in charts:
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for label, colour, points in points_of(chart, runs):
            # a single point is not visible as a line
            marker = "o" if len(points) < 2 or (len(points) < 30 and label != "training") else ""
            axes.plot(*zip(*points), label=label, color=colour, marker=marker, markersize=3, linewidth=1.4)
        if not axes.lines:
            continue
        axes.set_title(chart.title, fontsize=10)
        metric = chart.lines[-1].label if len(runs) > 1 else ""
        axes.set_ylabel(f"{chart.unit} ({metric})" if metric else chart.unit, fontsize=8)
        axes.set_xlabel("training step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160)
        yield chart.title, picture.getvalue()


def points_of(chart: Chart, runs: Mapping[str, Metrics]) -> Iterator[tuple[str, str | None, list[tuple[int, float]]]]:
    """Yield the label, colour and points of each curve in a chart."""
    for name, metrics in runs.items():
        for line in chart.lines[-1:] if len(runs) > 1 else chart.lines:
            if points := [(m["step"], m[line.metric]) for m in metrics if _is_number(m.get(line.metric))]:
                yield (name, None, points) if len(runs) > 1 else (line.label, line.colour, points)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value - value == 0
