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
from lab.study.plan import ALL, CAPTION_FRACTIONS, FROZEN, TEXT_RATIOS, USUAL_RATIO
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
COMMON: dict[str, Any] = {"text_ratio": None, "captions": None, "caption_fraction": 1.0}  # where nothing else is said
COLOURS = dict(zip(OBJECTIVES, ("0.7", "tab:blue", "tab:orange", "tab:red")))
TASK_COLOURS = ("tab:green", "tab:purple")  # of FROZEN

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
        found = self.matching(self.rows, task=task, **wanted)
        return {row["seed"]: row["top1"] for row in found}

    def matching(self, rows: Iterable[Row], **wanted: Any) -> list[Row]:
        """Return the rows of an encoder. One of an earlier study lacks what was the same for all then."""
        steps = 0 if wanted["objective"] == "random" else self.steps
        wanted = COMMON | {"width": self.width, "steps": steps} | wanted
        return [row for row in rows if all((COMMON | row)[key] == value for key, value in wanted.items())]

    def lengths(self) -> list[int]:
        """Return the steps of encoders of the common width."""
        return [steps for width, steps in self.sizes() if width == self.width]

    def widths(self) -> list[int]:
        """Return the widths of encoders of the common number of steps."""
        return [width for width, steps in self.sizes() if steps == self.steps]

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
        *_table(["captions kept", *(TASKS[task] for task in FROZEN)], _fractions(rows)),
        *_table(["width", "steps", "encoder", *(TASKS[task] for task in FROZEN)], _sizes(rows)),
        *_table(["held-out", "image loss", "text loss", "text accuracy"], _losses(study, rows)),
    ]
    return (
        "\n".join(lines)
        + f"\n![Accuracy by encoder, captions kept, text mask ratio, training time and width]({PLOT})\n"
    )


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


def _by_fraction(rows: Rows, task: str) -> dict[float, dict[int, float]]:
    """Return accuracies by seed, of each fraction of captions that is there; MAE keeps none."""
    found = {0.0: rows.top1(task, **OBJECTIVES["MAE"])}
    found |= {fraction: rows.top1(task, **WHOLE | {"caption_fraction": fraction}) for fraction in CAPTION_FRACTIONS}
    return {fraction: values for fraction, values in found.items() if values}


def _fractions(rows: Rows) -> Iterable[list[str]]:
    found = {task: _by_fraction(rows, task) for task in FROZEN}
    for fraction in (0.0, *CAPTION_FRACTIONS):
        yield [f"{100 * fraction:.0f} %", *(_spread(found[task].get(fraction, {})) for task in FROZEN)]


def _sizes(rows: Rows) -> Iterable[list[str]]:
    for width, steps in rows.sizes():
        for name in ("MAE", "M3AE"):
            cells = [_spread(rows.top1(task, **OBJECTIVES[name], width=width, steps=steps)) for task in FROZEN]
            yield [str(width), str(steps), name, *cells]


def _losses(study: dict[str, Any], rows: Rows) -> Iterable[list[str]]:
    """Return the losses of the common sizes."""
    for name in ("MAE", "M3AE"):
        if found := rows.matching(study["encoders"], **OBJECTIVES[name]):
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
    """Draw the study in five panels: encoders; then, as the paper's figures 3, 4 and 5, captions kept, training time,
    width and text mask ratio. Error bars: one standard error of the test set."""
    rows, data = Rows(study), study["data"]
    figure = plt.figure(figsize=(14, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    places = (grid[0, :4], grid[0, 4:], grid[1, :2], grid[1, 2:4], grid[1, 4:])
    first, *others = (figure.add_subplot(place) for place in places)
    samples = data["labelled test samples"]
    _draw_objectives(rows, first, samples)
    first.axhline(100 * data["majority class"], color="black", lw=0.8, ls=":", label="always the largest class")
    for panel, axis in zip((_draw_fractions, _draw_lengths, _draw_widths, _draw_ratios), others):
        panel(rows, axis, samples)
    low, high = zip(*(axis.get_ylim() for axis in others))
    for axis in (first, *others):
        if axis is not first:
            axis.set_ylim(min(low), max(high))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.9)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
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
    for task, colour, aside in zip(FROZEN, TASK_COLOURS, (-0.5, 0.5)):
        found = {ratio: rows.top1(task, **WHOLE | {"text_ratio": ratio}) for ratio in TEXT_RATIOS}
        points = {100 * ratio + aside: Point.of(values, samples) for ratio, values in found.items() if values}
        _draw_line(axis, points, color=colour, label=f"M3AE, {TASKS[task]}")
        if mae := rows.top1(task, objective="mae"):
            axis.axhline(100 * mean(mae.values()), color=colour, ls="--", lw=1, label=f"MAE, {TASKS[task]}")
    axis.set_xticks([100 * ratio for ratio in TEXT_RATIOS])
    axis.set(xlabel="text tokens masked, %", title="text mask ratio (figure 5)")


def _draw_fractions(rows: Rows, axis: Axes, samples: int) -> None:
    for task, colour in zip(FROZEN, TASK_COLOURS):
        points = {100 * part: Point.of(values, samples) for part, values in _by_fraction(rows, task).items()}
        _draw_line(axis, points, color=colour, label=TASKS[task])
    axis.set_xticks([0, *(100 * fraction for fraction in CAPTION_FRACTIONS)])
    axis.set(xlabel="pairs that keep their caption, %", title="captions (0 %: MAE; figure 3)")


def _draw_lengths(rows: Rows, axis: Axes, samples: int) -> None:
    _draw_both(rows, axis, samples, "steps", rows.lengths())
    axis.set(xlabel="steps of pre-training", title="training time, by linear probe (figure 4)")


def _draw_widths(rows: Rows, axis: Axes, samples: int) -> None:
    _draw_both(rows, axis, samples, "width", rows.widths())
    axis.set(xlabel="width of the encoder", title="size, by linear probe (figure 4)")


def _draw_both(rows: Rows, axis: Axes, samples: int, setting: str, values: list[int]) -> None:
    """Draw a line for MAE and one for M3AE over the values of a setting."""
    shift = 0.01 * max(values, default=0)
    for name, aside in (("MAE", -shift), ("M3AE", shift)):
        found = {value: rows.top1("linear", **OBJECTIVES[name], **{setting: value}) for value in values}
        points = {value + aside: Point.of(by_seed, samples) for value, by_seed in found.items() if by_seed}
        _draw_line(axis, points, color=COLOURS[name], label=name)
    axis.set_xticks(values)


def _draw_line(axis: Axes, points: dict[float, Point], **style: Any) -> None:
    if points:
        means, errors = zip(*points.values())
        axis.errorbar(list(points), means, yerr=errors, fmt="-o", capsize=2, elinewidth=0.8, **style)
