"""A study's results: study.json, and the tables and the plot made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.table import END, START, rewrite
from lab.study.plan import ALL, FROZEN, TEXT_RATIOS, USUAL_RATIO
from m3ae_fast.whole_file import put_in_place

JSON, PLOT, PAGE = "study.json", "study.png", "README.md"
TASKS = {"knn": "k-NN", "linear": "linear probe", "finetune": "fine-tuned"}
WHOLE: dict[str, Any] = {"objective": "m3ae", "text_ratio": USUAL_RATIO, "captions": "whole"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "random": {"objective": "random"},
    "MAE": {"objective": "mae"},
    "M3AE": WHOLE,
    "M3AE, captions name no class": WHOLE | {"captions": "nameless"},
}
COLOURS = dict(zip(OBJECTIVES, ("0.7", "tab:blue", "tab:orange", "tab:red")))

Row = dict[str, Any]


def save(folder: Path, study: dict[str, Any]) -> None:
    """Write study.json, README.md and study.png. What stands in README.md outside of the markers stays."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{JSON}"
    partial.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    put_in_place(partial, folder / JSON)
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {study['title']}\n\n{START}\n{END}\n"
    page.write_text(rewrite(text, tables(study)), encoding="utf-8")
    draw(study, folder / PLOT)


class Rows:
    """Accuracies by encoder and task. `width` and `steps` are the common encoder's where nothing else is asked for."""

    def __init__(self, study: dict[str, Any]) -> None:
        self.rows: list[Row] = study["rows"]
        train = study["settings"]["train"]
        self.width, self.steps = train["model"]["emb_dim"], train["train"]["steps"]

    def top1(self, task: str, **wanted: Any) -> dict[int, float]:
        """Return the accuracy by seed."""
        steps = 0 if wanted["objective"] == "random" else self.steps
        wanted = {"width": self.width, "steps": steps, "text_ratio": None, "captions": None, "task": task} | wanted
        found = (row for row in self.rows if all(row[key] == value for key, value in wanted.items()))
        return {row["seed"]: row["top1"] for row in found}

    def sizes(self) -> list[tuple[int, int]]:
        """Return (width, steps) of pre-trained encoders."""
        return sorted({(row["width"], row["steps"]) for row in self.rows if row["steps"]})


def tables(study: dict[str, Any]) -> str:
    """Return all tables, in Markdown."""
    rows, about, data = Rows(study), study["about"], study["data"]
    lines = [
        f"{about['device']}, {about['threads']} thread, torch {about['torch']}, m3ae_fast {about['m3ae_fast']}, "
        f"{about['date']}. {data['labelled training samples']:,} labelled training and "
        f"{data['labelled test samples']:,} test samples of {data['classes']} classes. Top-1 accuracy in %: mean ± "
        f"standard deviation (seeds); chance is {100 * data['chance']:.1f}, always naming the largest class "
        f"{100 * data['majority class']:.1f}.",
        "",
        *_table(["encoder", *(TASKS[task] for task in ALL)], _objectives(rows)),
        *_table(["", *(TASKS[task] for task in ALL)], _differences(rows)),
        *_table(["text tokens masked", *(TASKS[task] for task in FROZEN)], _ratios(rows)),
        *_table(["width", "steps", "encoder", *(TASKS[task] for task in FROZEN)], _sizes(rows)),
        *_table(["held-out", "image loss", "text loss", "text accuracy"], _losses(study, rows)),
    ]
    return "\n".join(lines) + f"\n![Accuracy by encoder, text mask ratio, and size]({PLOT})\n"


def _objectives(rows: Rows) -> Iterable[list[str]]:
    for name, encoder in OBJECTIVES.items():
        yield [name, *(_spread(rows.top1(task, **encoder)) for task in ALL)]


def _differences(rows: Rows) -> Iterable[list[str]]:
    for name, one, other in (
        ("M3AE less MAE", "M3AE", "MAE"),
        ("MAE less random", "MAE", "random"),
        ("M3AE, captions name no class, less MAE", "M3AE, captions name no class", "MAE"),
    ):
        cells = []
        for task in ALL:
            a, b = (rows.top1(task, **OBJECTIVES[each]) for each in (one, other))
            cells.append(_spread({seed: a[seed] - b[seed] for seed in a if seed in b}, sign="+"))
        yield [name, *cells]


def _ratios(rows: Rows) -> Iterable[list[str]]:
    for ratio in TEXT_RATIOS:
        cells = [_spread(rows.top1(task, **WHOLE | {"text_ratio": ratio})) for task in FROZEN]
        yield [f"{100 * ratio:.0f} %", *cells]


def _sizes(rows: Rows) -> Iterable[list[str]]:
    for width, steps in rows.sizes():
        for name in ("MAE", "M3AE"):
            cells = [_spread(rows.top1(task, **OBJECTIVES[name], width=width, steps=steps)) for task in FROZEN]
            yield [str(width), str(steps), name, *cells]


def _losses(study: dict[str, Any], rows: Rows) -> Iterable[list[str]]:
    """Return the losses of the common sizes."""
    for name in ("MAE", "M3AE"):
        encoder = OBJECTIVES[name]
        wanted = {"text_ratio": None, "captions": None, "width": rows.width, "steps": rows.steps} | encoder
        found = [row for row in study["encoders"] if all(row[key] == value for key, value in wanted.items())]
        if found:
            names = ("val_image_loss", "val_text_loss", "val_text_accuracy")
            cells = ([row[n] for row in found if n in row] for n in names)
            yield [name, *(f"{mean(values):.3f}" if values else "-" for values in cells)]


def _table(columns: list[str], cells: Iterable[list[str]]) -> list[str]:
    numbers = sum(name in TASKS.values() or "loss" in name or "accuracy" in name for name in columns)
    head = ["---"] * (len(columns) - numbers) + ["--:"] * numbers
    return ["| " + " | ".join(row) + " |" for row in (columns, head, *cells)] + [""]


def _spread(by_seed: dict[int, float], sign: str = "") -> str:
    values = [100 * value for value in by_seed.values()]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread} ({len(values)})"


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw encoders, text mask ratios and sizes in three panels, with bars of one standard error of the test set."""
    rows, data = Rows(study), study["data"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1.5, 1, 1))
    samples = data["labelled test samples"]
    _draw_objectives(rows, axes[0], samples)
    axes[0].axhline(100 * data["majority class"], color="black", lw=0.8, ls=":", label="always the largest class")
    axes[0].legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    _draw_ratios(rows, axes[1], samples)
    _draw_sizes(rows, axes[2], samples)
    limits = [axis.get_ylim() for axis in axes[1:]]
    for axis in axes[1:]:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Point(NamedTuple):
    """A mean over seeds in %, and its standard error where the test samples alone are drawn by chance."""

    mean: float
    error: float

    @classmethod
    def of(cls, by_seed: dict[int, float], samples: int) -> Point:
        accuracy = mean(by_seed.values())
        return cls(100 * accuracy, 100 * (accuracy * (1 - accuracy) / samples) ** 0.5)


def _draw_objectives(rows: Rows, axis: Axes, samples: int) -> None:
    width = 0.8 / len(OBJECTIVES)
    for i, (name, encoder) in enumerate(OBJECTIVES.items()):
        for place, task in enumerate(ALL):
            if found := rows.top1(task, **encoder):
                x, point = place + (i - (len(OBJECTIVES) - 1) / 2) * width, Point.of(found, samples)
                axis.bar(
                    x,
                    point.mean,
                    0.92 * width,
                    yerr=point.error,
                    ecolor="0.35",
                    color=COLOURS[name],
                    label=None if place else name,
                )
                axis.plot([x] * len(found), [100 * value for value in found.values()], "k.", ms=4)
    axis.set_xticks(range(len(ALL)), [TASKS[task] for task in ALL])
    axis.set(ylabel="top-1 accuracy, %", title="what was trained (dots: seeds)")


def _draw_ratios(rows: Rows, axis: Axes, samples: int) -> None:
    for task, colour, aside in zip(FROZEN, ("tab:green", "tab:purple"), (-0.5, 0.5)):
        found = {ratio: rows.top1(task, **WHOLE | {"text_ratio": ratio}) for ratio in TEXT_RATIOS}
        points = {100 * ratio + aside: Point.of(values, samples) for ratio, values in found.items() if values}
        _draw_line(axis, points, color=colour, label=f"M3AE, {TASKS[task]}")
        if mae := rows.top1(task, objective="mae"):
            axis.axhline(100 * mean(mae.values()), color=colour, ls="--", lw=1, label=f"MAE, {TASKS[task]}")
    axis.set_xticks([100 * ratio for ratio in TEXT_RATIOS])
    axis.set(xlabel="text tokens masked, %", title="text mask ratio")


def _draw_sizes(rows: Rows, axis: Axes, samples: int) -> None:
    sizes, shift = rows.sizes(), 0.01 * rows.steps
    for name, aside in (("MAE", -shift), ("M3AE", shift)):
        for width in sorted({width for width, _ in sizes}):
            found = {s: rows.top1("linear", **OBJECTIVES[name], width=width, steps=s) for w, s in sizes if w == width}
            points = {steps + aside: Point.of(values, samples) for steps, values in found.items() if values}
            style = {} if width == rows.width else {"mfc": "white"}
            _draw_line(axis, points, color=COLOURS[name], label=f"{name}, {width} wide", **style)
    axis.set_xticks(sorted({steps for _, steps in sizes}))
    axis.set(xlabel="steps of pre-training", title="width and training time, by linear probe")


def _draw_line(axis: Axes, points: dict[float, Point], **style: Any) -> None:
    if points:
        means, errors = zip(*points.values())
        axis.errorbar(list(points), means, yerr=errors, fmt="-o", capsize=2, elinewidth=0.8, **style)
