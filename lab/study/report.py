"""Results of the study: the answers for each sample, and the metrics, tables and plot that are computed from them."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.table import END, START, rewrite
from lab.markdown import table
from lab.study.measure import LOSSES, RETRIEVED, SCORES, Labels
from lab.study.plan import CAPTION_FRACTIONS, CLOTHES_LENGTH, TEXT_RATIOS, USUAL_RATIO, Encoder
from lab.study.statistics import Estimate, accuracy, cell, difference
from lab.trials import machine
from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.errors import UserError

JSON, PLOT, PAGE, ANSWERS = "study.json", "study.png", "README.md", "answers.json.xz"
TITLE = "What captions add to a masked autoencoder"

EMOJI = {"knn": "k-NN", "linear": "linear", "attentive": "attentive", "subcategory": "subcategory, linear"}
SHIFT = {"same_style_knn": "k-NN, same style", "shift_knn": "k-NN, other style",
         "same_style_linear": "linear, same style", "shift_linear": "linear, other style"}  # fmt: skip
SHOTS = {"shots1": "1 shot", "shots5": "5 shots", "shots10": "10 shots"}
CLOTHES = {"clothes_knn": "k-NN", "clothes_linear": "linear"}
RETRIEVAL = {"image_to_text": "image to caption", "text_to_image": "caption to image"}
OOD = {
    f"ood_{name}_{score}": f"{title}, {score.replace('_', ' ')}"
    for name, title in (("clothes", "Fashion-MNIST"), ("clip_art", "clip art"))
    for score in SCORES
}
SWEPT = {"knn": "k-NN", "linear": "linear", "shift_linear": "linear, other style"}  # tests of all encoders
NAMES = {"pixels": "raw pixels", "random": "random weights", "mae": "MAE", "m3ae": "M3AE"}
FASHION = "Fashion-MNIST"
COMMON: dict[str, Any] = {}  # denotes the common encoder, which has no differing properties
Line = tuple[str, str, dict[str, Any]]  # a row of a table: name, objective, and differing properties
COLOURS = {"pixels": "0.55", "random": "0.8", "mae": "tab:blue", "m3ae": "tab:orange"}


class Rows:
    """Results by encoder and test. `width`, `steps`: properties of the common encoder; queries use them as defaults."""

    def __init__(self, found: Sequence[dict[str, Any]], labels: Labels, width: int, steps: int) -> None:
        self.found, self.labels, self.width, self.steps = found, labels, width, steps
        self.of_clothes = {"images": "clothes", "steps": CLOTHES_LENGTH * steps}

    def of(self, objective: str, **wanted: Any) -> list[dict[str, Any]]:
        """Return the results of an encoder, one for each seed. `wanted`: properties that differ from the common
        encoder."""
        steps = self.steps if objective in ("mae", "m3ae") else 0
        ratio = USUAL_RATIO if objective == "m3ae" else None
        usual = asdict(Encoder(objective, self.width, steps, 0, ratio)) | wanted
        del usual["seed"]
        return [row for row in self.found if all(row["encoder"][key] == value for key, value in usual.items())]

    def accuracy(self, test: str, objective: str, **wanted: Any) -> Estimate | None:
        seeds = self._seeds(test, self.of(objective, **wanted))
        return accuracy(seeds, self.labels) if seeds else None

    def difference(
        self, test: str, first: str, second: str, wanted: dict[str, Any] = COMMON, other: dict[str, Any] = COMMON
    ) -> Estimate | None:
        """Return the difference between the accuracies of two encoders in a test, first minus second. `wanted`:
        properties of the first encoder that differ from the common encoder; `other`: those of the second encoder."""
        one, another = (self._seeds(test, self.of(name, **own)) for name, own in ((first, wanted), (second, other)))
        return difference(one, another, self.labels)

    def number(self, name: str, objective: str) -> list[float]:
        return [row["numbers"][name] for row in self.of(objective) if name in row["numbers"]]

    def _seeds(self, test: str, rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
        return {row["encoder"]["seed"]: row["correct"][test] for row in rows if test in row["correct"]}


def save(folder: Path, head: dict[str, Any], found: Sequence[dict[str, Any]], labels: Labels) -> None:
    """Write the answers, the metrics, the page and its plot. Text in README.md outside of the markers is unchanged.

    Args:
        folder: output folder, which is created if necessary.
        head: `about` (the machine), `settings`, and `validation` (whether the validation samples were used).
        found: results of encoders.
        labels: labels of all samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {"settings": head["settings"], "validation": head["validation"], "encoders": found}
    with atomic_write(folder / ANSWERS) as partial:
        partial.write_bytes(lzma.compress(json.dumps(known).encode()))
    encoders = [{key: value for key, value in row.items() if key != "correct"} for row in found]
    write_text_atomically(folder / JSON, json.dumps(head | {"encoders": encoders}, indent=1) + "\n")
    train = head["settings"]["train"]
    rows = Rows(found, labels, train["model"]["emb_dim"], train["train"]["steps"])
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {TITLE}\n\n{START}\n{END}\n"
    page.write_text(rewrite(text, tables(rows, head)), encoding="utf-8")
    draw(rows, folder / PLOT)


def read_answers(folder: Path, settings: dict[str, Any], validation: bool) -> list[dict[str, Any]]:
    """Return the results that an earlier call, possibly on another machine, has written to `folder`; empty if there are
    none.

    Raises:
        UserError: the results have different settings.
    """
    if not (folder / ANSWERS).exists():
        return []
    known = json.loads(lzma.decompress((folder / ANSWERS).read_bytes()))
    if (known["settings"], known["validation"]) != (settings, validation):
        raise UserError(f"{folder}: has results of other settings; choose another folder (--out, --results)")
    return known["encoders"]


def tables(rows: Rows, head: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    seconds = sum(row["train_cpu_s"] + row["measure_cpu_s"] for row in rows.found)
    lines = [
        f"{machine(head['about'])}; "
        f"{seconds / 60:.0f} minutes on one core; measured on {'validation' if head['validation'] else 'test'} "
        "samples. Accuracy in %: mean ± standard error (number of seeds). The standard error covers samples and seeds; "
        "it is a conservative estimate."
    ]
    words, clothes = ("words of the caption", "captions", COMMON), (f"MAE of {FASHION}", "mae", rows.of_clothes)
    for title, columns, more, against in (
        ("emoji category", EMOJI, [words], []),
        ("emoji category; probe trained on one vendor's images", SHIFT, [], []),
        ("emoji category, few-shot k-NN", SHOTS, [], []),
        (FASHION, CLOTHES, [clothes], [(clothes, other) for other in ("pixels", "random", "mae")]),
    ):
        usual: list[Line] = [(name, objective, COMMON) for objective, name in NAMES.items()]
        pairs: list[tuple[Line, str]] = [(usual[2], "pixels"), (usual[2], "random"), (usual[3], "mae"), *against]
        cells = [
            [name, *(cell(rows.accuracy(test, what, **own)) for test in columns)] for name, what, own in [*usual, *more]
        ]
        cells += [
            [f"{name} minus {NAMES[other]}", *(cell(rows.difference(test, what, other, own), "+") for test in columns)]
            for (name, what, own), other in pairs
        ]
        lines += ["", table([title, *columns.values()], cells)]
    lines += ["", table([f"retrieval, recall at {RETRIEVED} in %", *RETRIEVAL.values(), "chance"], _retrieval(rows))]
    lines += ["", table(["AUROC in %, mean (range over seeds); in-distribution: emoji", *OOD.values()], _ood(rows))]
    for title in _run(rows):
        swept = [_swept(rows, point) for point in SWEEPS[title](rows)]
        apart = [f"linear, difference from {other}" for other in ("raw pixels", "MAE")]
        lines += ["", table([title, *SWEPT.values(), *apart], swept)]
    lines += ["", table(["losses on held-out samples", *LOSSES.values()], _losses(rows))]
    alt = "Accuracy by encoder, and by text mask ratio, fraction of captions, training time and encoder width"
    return "\n".join(lines) + f"\n\n![{alt}]({PLOT})\n"


class Point(NamedTuple):
    """A point in a plot: an encoder that differs from the common one."""

    name: str
    x: float
    objective: str
    wanted: dict[str, Any]  # properties that differ from the common encoder
    mae: dict[str, Any]  # properties of the MAE with which it is compared


def _swept(rows: Rows, point: Point) -> list[str]:
    cells = [cell(rows.accuracy(test, point.objective, **point.wanted)) for test in SWEPT]
    apart = rows.difference("linear", "m3ae", "mae", point.wanted, point.mae) if point.objective == "m3ae" else None
    pixels = rows.difference("linear", point.objective, "pixels", point.wanted)
    return [point.name, *cells, cell(pixels, "+"), cell(apart, "+")]


def _ratios(rows: Rows) -> Iterable[Point]:
    for ratio in TEXT_RATIOS:
        yield Point(f"{100 * ratio:.0f} %", 100 * ratio, "m3ae", {"text_ratio": ratio}, {})


def _fractions(rows: Rows) -> Iterable[Point]:
    yield Point("0 % (MAE)", 0, "mae", {}, {})
    for fraction in CAPTION_FRACTIONS:
        yield Point(f"{100 * fraction:.0f} %", 100 * fraction, "m3ae", {"caption_fraction": fraction}, {})


def _sizes(key: str, rows: Rows) -> Iterable[Point]:
    usual = {"width": rows.width, "steps": rows.steps}
    trained = [row["encoder"] for row in rows.found if row["encoder"]["objective"] in ("mae", "m3ae")]
    others = [each for each in trained if each["images"] == "emoji"]
    values = sorted({each[key] for each in others if all(each[k] == v for k, v in usual.items() if k != key)})
    for value in values:
        for objective in ("mae", "m3ae"):
            yield Point(f"{value}, {NAMES[objective]}", value, objective, {key: value}, {key: value})


SWEEPS: dict[str, Callable[[Rows], Iterable[Point]]] = {
    "text tokens masked": _ratios,
    "captions kept": _fractions,
    "steps": partial(_sizes, "steps"),
    "width": partial(_sizes, "width"),
}
AXES = {  # title and label of the x axis of each plot
    "text tokens masked": ("Linear probe by text mask ratio (figure 5 of the paper)", "text tokens masked, %"),
    "captions kept": ("Linear probe by fraction of captions (figure 3)", "captions kept, %"),
    "steps": ("Linear probe by training time (figure 4)", "training steps"),
    "width": ("Linear probe by encoder width (figure 4)", "encoder width (embedding dimension)"),
}


def _retrieval(rows: Rows) -> Iterable[list[str]]:
    chance = rows.number("retrieval_chance", "m3ae")
    cells = [cell(rows.accuracy(test, "m3ae")) for test in RETRIEVAL]
    yield [NAMES["m3ae"], *cells, f"{100 * mean(chance):.1f}" if chance else "-"]


def _ood(rows: Rows) -> Iterable[list[str]]:
    """Return the rows of the table on out-of-distribution detection, with means, minima and maxima over seeds."""
    for objective, name in NAMES.items():
        cells = []
        for score in OOD:
            values = [100 * value for value in rows.number(score, objective)]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "-")
        yield [name, *cells]


def _losses(rows: Rows) -> Iterable[list[str]]:
    """Return the rows of the table of losses, with means over seeds."""
    for objective in ("mae", "m3ae"):
        losses = [row["losses"] for row in rows.of(objective)]
        cells = ([each[name] for each in losses if name in each] for name in LOSSES)
        yield [NAMES[objective], *(f"{mean(values):.3f}" if values else "-" for values in cells)]


def _run(rows: Rows) -> list[str]:
    """Return the names of the SWEEPS that have results for at least two values."""
    known = {title: {p.x for p in sweep(rows) if rows.of(p.objective, **p.wanted)} for title, sweep in SWEEPS.items()}
    known["captions kept"].discard(0)  # a fraction of 0 is the MAE
    return [title for title, values in known.items() if len(values) > 1]


def draw(rows: Rows, path: Path) -> None:
    """Plot the accuracies by encoder. For each of the paper's figures 3, 4 and 5 for which there are results, also plot
    the accuracies of linear probes.

    Error bars are standard errors. The legend of the encoders is above all panels, so that it covers no bar.
    """
    bars = {
        "Emoji categories": EMOJI,
        "Emoji categories: change of drawing style, few shots": SHIFT | SHOTS,
        "Fashion-MNIST classes": CLOTHES,
    }
    swept = _run(rows)
    height = 1 + (len(swept) + 2) // 3
    figure, axes = plt.subplots(height, 3, figsize=(15, 0.5 + 4 * height), layout="constrained", squeeze=False)
    for axis, (title, tests) in zip(axes.ravel(), bars.items()):
        _draw_bars(rows, axis, tests, title)
    for axis, title in zip(axes.ravel()[len(bars) :], swept):
        _draw_sweep(rows, axis, title)
    names: dict[str, Any] = {}
    for axis in axes.ravel():
        axis.set_visible(bool(axis.get_title()))
        for handle, name in zip(*axis.get_legend_handles_labels()):
            names.setdefault(name, handle)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    figure.legend(
        names.values(),
        names.keys(),
        loc="outside upper center",
        ncols=len(names) or 1,
        title="error bars: ± 1 standard error over test samples and seeds",
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_sweep(rows: Rows, axis: Axes, title: str) -> None:
    """Plot linear probes by the values of a setting, with one line for each training objective."""
    points: dict[str, list[tuple[float, Estimate]]] = {}
    for point in SWEEPS[title](rows):
        line = point.objective if title in ("steps", "width") else "m3ae"
        if found := rows.accuracy("linear", point.objective, **point.wanted):
            points.setdefault(line, []).append((point.x, found))
    for objective, own in points.items():
        estimates = [each for _, each in own]
        axis.errorbar([x for x, _ in own], [100 * each.mean for each in estimates],
                      yerr=[100 * each.error for each in estimates], fmt="-o", capsize=2,
                      color=COLOURS[objective], label=NAMES[objective])  # fmt: skip
    if title == "text tokens masked" and (mae := rows.accuracy("linear", "mae")):
        axis.axhline(100 * mae.mean, color=COLOURS["mae"], ls="--", label=f"{NAMES['mae']} (no text)")
    heading, unit = AXES[title]
    axis.set(xlabel=unit, ylabel="top-1 accuracy on emoji categories, %", title=heading)


def _draw_bars(rows: Rows, axis: Axes, tests: dict[str, str], title: str) -> None:
    """Plot the accuracy of each encoder in each test, as groups of bars."""
    lines: list[tuple[Line, str]] = [((name, what, COMMON), COLOURS[what]) for what, name in NAMES.items()]
    lines += [((f"MAE of {FASHION}", "mae", rows.of_clothes), "tab:green")] if tests is CLOTHES else []
    width = 0.8 / len(lines)
    for number, ((name, what, own), colour) in enumerate(lines):
        found = [(place, e) for place, test in enumerate(tests) if (e := rows.accuracy(test, what, **own))]
        if found:
            x = [place + (number - (len(lines) - 1) / 2) * width for place, _ in found]
            axis.bar(x, [100 * e.mean for _, e in found], 0.9 * width, yerr=[100 * e.error for _, e in found],
                     capsize=2, color=colour, label=name)  # fmt: skip
    axis.set_xticks(range(len(tests)), [name.replace(", ", ",\n") for name in tests.values()], fontsize=7)
    axis.set(ylabel="top-1 accuracy, %", title=title)
