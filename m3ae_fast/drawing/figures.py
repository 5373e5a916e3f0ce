"""Figures of results: curves, confusion matrices, scores, and sheets of samples.

Shapes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import ModelConfig
from m3ae_fast.images.normalisation import normalised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE, _GAP, _LINE = 128, 6, 13  # sizes in pixels: side of an image, gap between images, height of a text line
_WIDE = 22  # number of characters per line below an image
Colour = tuple[int, int, int]
BLACK, GREEN, RED = (20, 20, 20), (0, 130, 50), (190, 30, 30)
# maximum numbers of classes in a confusion matrix, and of classes whose names are shown
_MOST_CONFUSED, _MOST_NAMES = 1000, 40
_ERRORS = "error bars: ± 1 standard error"
_ACCURACY = "top-1 accuracy (fraction of samples)"


class Cell(NamedTuple):
    """An image, a text, or an image with a text below it."""

    image: Tensor | None  # uint8 [C, H, W]
    text: str = ""
    colour: Colour = BLACK


def draw_sheet(path: Path, rows: Sequence[Sequence[Cell]], titles: Sequence[str] = ()) -> None:
    """Write a PNG with rows of cells; `titles` are the column headings."""
    columns = max(map(len, rows))
    lines = max([1, *(len(_wrapped(cell)) for row in rows for cell in row if cell.image is not None)])
    width, height, top = _SIDE + _GAP, _SIDE + lines * _LINE + _GAP, 20 if titles else _GAP
    sheet = Image.new("RGB", (_GAP + columns * width, top + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * width, 4), title, fill=BLACK, font=font)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            x, y = _GAP + column * width, top + number * height
            if cell.image is not None:
                sheet.paste(shown(cell.image), (x, y))
                y += _SIDE
            for line in _wrapped(cell):
                draw.text((x, y), line, fill=cell.colour, font=font)
                y += _LINE
    with atomic_write(path) as partial:
        sheet.save(partial, format="PNG")


def levels(image: Tensor, model: ModelConfig, channels: Sequence[int] | None = None) -> Tensor:
    """Return a model input [C, H, W] as an image for display: uint8, with the displayed channels. 8-bit levels are
    unchanged. Pixels of other dtypes often cover only a small part of their range, so black is two standard deviations
    below the mean, and white is two above it.

    Args:
        image: uint8, uint16, or floating-point and normalised.
        model: config with the mean and standard deviation.
        channels: channels for red, green and blue (`data.show_channels`); None: the first three if there are 3 or 4,
            otherwise the first.

    Raises:
        UserError: a channel does not exist.
    """
    if channels is not None and max(channels) >= len(image):
        raise UserError(f"data.show_channels {list(channels)}: images have channels 0 to {len(image) - 1}")
    if image.dtype != torch.uint8:
        image = stretched(normalised(image, model.image_mean, model.image_std))
    if channels is not None:
        return image[list(channels)]
    return image[: 3 if len(image) in (3, 4) else 1]


def stretched(normal: Tensor) -> Tensor:
    """Return normalised floating-point values as uint8 levels in the same shape: -2 as black, 2 as white."""
    return (255 * (normal / 4 + 0.5).clamp(0, 1)).round().to(torch.uint8)


def shown(image: Tensor, side: int = _SIDE) -> Image.Image:
    """Return an image, uint8 [C, H, W] with C = 1 or 3, as an RGB image of `side` x `side` pixels, placed according to
    `box_in`."""
    array = image.permute(1, 2, 0).numpy()
    whole = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    left, top, width, height = box_in(image, side)
    sheet = Image.new("RGB", (side, side), "white")
    sheet.paste(whole.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return sheet


def box_in(image: Tensor, side: int) -> tuple[int, int, int, int]:
    """Return the left, top, width and height of an image [C, H, W] that is scaled to fit into a square and centred in
    it."""
    width, height = (max(1, round(side * own / max(image.shape[1:]))) for own in (image.shape[2], image.shape[1]))
    return (side - width) // 2, (side - height) // 2, width, height


def _wrapped(cell: Cell) -> list[str]:
    most = 2 if cell.image is not None else _SIDE // _LINE
    return textwrap.wrap(cell.text, _WIDE, max_lines=most, placeholder=" ...")


def draw_confusion(path: Path, labels_N: Tensor, predicted_N: Tensor, classes: Sequence[int | str]) -> None:
    """Write a PNG of the confusion matrix of the class ids `labels_N` and `predicted_N`, int64 [N]. It shows, for each
    class, the fractions of its samples that were predicted as each of the classes. If there are more than
    _MOST_CONFUSED classes, only the classes with the most samples are shown."""
    samples_K = np.bincount(labels_N.numpy(), minlength=len(classes))
    shown = np.sort(np.argsort(-samples_K, kind="stable")[:_MOST_CONFUSED])
    count, place_K = len(shown), np.full(len(classes), -1)
    place_K[shown] = np.arange(count)
    rows_N, columns_N = place_K[labels_N.numpy()], place_K[predicted_N.numpy()]
    seen_N = (rows_N >= 0) & (columns_N >= 0)
    flat = np.bincount(rows_N[seen_N] * count + columns_N[seen_N], minlength=count * count)
    fractions = flat.reshape(count, count) / np.maximum(samples_K[shown, None], 1)
    side = min(3 + 0.3 * count, 12)
    figure, (axes,) = _figure(side + 0.8, side)
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, fraction=0.046, label="fraction of the samples of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
    if count < len(classes):
        axes.set_title(f"Confusion matrix of the {count:,} largest of {len(classes):,} classes")
    if count <= _MOST_NAMES:
        names = [str(classes[number])[:20] for number in shown]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    _save(figure, path)


def draw_training(path: Path, metrics: Sequence[Mapping[str, Any]], steps_per_epoch: int) -> None:
    """Write a PNG of loss and accuracies over epochs, from the lines of metrics.jsonl."""
    figure, panels = _figure(8.4, 3.2, 2)
    lines = (("loss", "training", 0), ("accuracy", "training", 1), ("val_top1", "held-out, top-1", 1))
    for name, label, panel in (*lines, ("val_top5", "held-out, top-5", 1)):
        points = [(line["step"] / steps_per_epoch, line[name]) for line in metrics if name in line]
        if points:
            panels[panel].plot(*zip(*points), label=label, marker="o" if len(points) < 30 else "", markersize=3)
    titles = (
        ("Training loss", "cross-entropy (nats)"),
        ("Accuracy on training and held-out samples", "accuracy (fraction of samples)"),
    )
    for axes, (title, quantity) in zip(panels, titles):
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[1].set_ylim(0, 1)
    panels[1].legend(fontsize=8, frameon=False)
    _save(figure, path)


def draw_accuracies(
    path: Path, lines: Mapping[str, Sequence[tuple[float, float, float]]], axis: str, metric: Literal["top1", "map"]
) -> None:
    """Write a PNG of accuracies, or of mAP, against x, with one line of points (x, accuracy, standard error) per name.
    `axis`: label of the x axis."""
    figure, (axes,) = _figure(5.6, 3.6)
    for name, points in lines.items():
        x, accuracy, error = zip(*points)
        axes.errorbar(x, accuracy, yerr=error, label=name, marker="o", markersize=3, capsize=2, linewidth=1.2)
    short, label = {"top1": ("Accuracy", _ACCURACY), "map": ("mAP", "mean average precision")}[metric]
    axes.set(xlabel=axis, ylabel=label, xticks=sorted({point[0] for each in lines.values() for point in each}))
    axes.set_title(f"{short} by {axis}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, title=_ERRORS, title_fontsize=7)
    _save(figure, path)


def draw_comparison(path: Path, rows: Sequence[Mapping[str, Any]], chance: float) -> None:
    """Write a PNG that shows the accuracy of each model and probe, with standard errors, and `chance`, the accuracy of
    always predicting the largest class.

    Each of `rows` has the keys model, probe, top1 and top1_se.
    """
    models, probes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "probe"))
    figure, (axes,) = _figure(1.6 + 0.5 * len(rows), 3.8)
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        x = [probes.index(row["probe"]) + (number - (len(models) - 1) / 2) * width for row in own]
        errors = [row["top1_se"] for row in own]
        axes.bar(x, [row["top1"] for row in own], 0.9 * width, yerr=errors, capsize=2, label=str(model)[:40])
    axes.axhline(chance, color="grey", linestyle=":", linewidth=1, label="largest class")
    axes.set_xticks(range(len(probes)), probes)
    axes.set(xlabel="probe of the frozen features", ylabel=_ACCURACY)
    axes.set_title("Accuracy by model and probe", fontsize=10)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(fontsize=8, frameon=False, title=_ERRORS, title_fontsize=7, **place)
    _save(figure, path)


def draw_attack(path: Path, epsilons: Sequence[float], top1: Sequence[float], clean: float) -> None:
    """Write a PNG of the accuracy `top1` against the bound `epsilons` of an attack in units of 1/255. `clean`: accuracy
    without an attack, shown for the bound 0."""
    figure, (axes,) = _figure(4.6, 3.2)
    axes.plot([0, *epsilons], [clean, *top1], marker="o", markersize=4)
    axes.set(xlabel="L-infinity bound of the attack, in units of 1/255", ylabel=_ACCURACY, ylim=(0, 1))
    axes.set_title("Accuracy under PGD attacks", fontsize=10)
    axes.grid(alpha=0.25)
    _save(figure, path)


def draw_detection(path: Path, inside: Mapping[str, np.ndarray], outside: Mapping[str, np.ndarray]) -> None:
    """Write a PNG with ROC curves and histograms of the scores of in-distribution samples (`inside`) and
    out-of-distribution samples (`outside`), by name of the score: float [samples], higher for in-distribution
    samples."""
    from sklearn.metrics import RocCurveDisplay

    figure, panels = _figure(3 * (1 + len(inside)), 3.2, 1 + len(inside))
    for axes, (name, known) in zip(panels[1:], inside.items()):
        other = outside[name]
        truth = np.repeat([1, 0], (len(known), len(other)))
        both = np.concatenate((known, other))
        title = name.replace("_", " ")
        RocCurveDisplay.from_predictions(truth, both, name=title, ax=panels[0])
        low, high = np.quantile(both, (0.005, 0.995))
        bins = np.linspace(low, high, 41).tolist()
        for part, label in ((known, "in-distribution (held-out)"), (other, "out-of-distribution")):
            axes.hist(part.clip(low, high), bins, density=True, alpha=0.55, label=label)
        axes.set_title(f"Score distribution: {title}", fontsize=9)
        axes.set(xlabel="score (higher: more in-distribution)", ylabel="density", yticks=[])
    panels[0].set_title("ROC curves of all scores", fontsize=9)
    panels[0].set(
        xlabel="false positive rate\n(out-of-distribution samples accepted)",
        ylabel="true positive rate\n(in-distribution samples accepted)",
    )
    panels[0].legend(fontsize=6, loc="lower right")
    handles, labels = panels[1].get_legend_handles_labels()
    # outside the axes, so that it does not cover bars
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=7, frameon=False)
    _save(figure, path)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj():
        if isinstance(text, Text):
            text.set_parse_math(False)  # the name of a class may be invalid math such as $\frac{$
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
