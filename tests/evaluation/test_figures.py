"""The content of the figures of results, checked in matplotlib's objects and in the pixels."""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import auc

from m3ae_fast.batch.packing import Sample
from m3ae_fast.config import ModelConfig, OptimConfig, TrainConfig
from m3ae_fast.drawing import figures
from m3ae_fast.drawing.figures import BLACK, GREEN, RED, Cell
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation import job, knn, labelled_task
from m3ae_fast.heads.feature_bank import FeatureBank

pytestmark = pytest.mark.slow


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of saved figures."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: kept.append(self) or save(self, *to, **how))
    return kept


@pytest.mark.parametrize(("classes", "named"), [(40, True), (41, False)])
def test_few_classes_are_named_in_a_confusion_matrix(drawn, tmp_path, classes, named):
    labels = list(range(classes))
    figures.draw_confusion(tmp_path / "a.png", torch.arange(classes), torch.arange(classes), labels)
    ticks = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert (ticks == [str(label) for label in labels]) == named


def test_each_row_of_a_confusion_matrix_shows_fractions_of_one_label(drawn, tmp_path):
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 2, 1, 0, 0, 1])
    figures.draw_confusion(tmp_path / "a.png", labels, predicted, ["a", "b", "c", "d"])
    axes = drawn[0].axes[0]
    expected = np.array([[0.75, 0, 0.25, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert axes.images[0].get_clim() == (0, 1)  # a colour stands for the same share in all figures
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [text.get_text() for text in ticks] == ["a", "b", "c", "d"]


def test_a_confusion_matrix_of_very_many_classes_shows_the_largest_ones(drawn, tmp_path, monkeypatch):
    """The other classes are left out, but predictions of these classes still count in the fractions."""
    monkeypatch.setattr(figures, "_MOST_CONFUSED", 2)
    labels, predicted = torch.tensor([0, 1, 1, 1, 1, 3, 3]), torch.tensor([3, 1, 1, 3, 0, 3, 1])
    figures.draw_confusion(tmp_path / "a.png", labels, predicted, ["a", "b", "c", "d"])
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.5, 0.25], [0.5, 0.5]])
    assert axes.get_title() == "Confusion matrix of the 2 largest of 4 classes"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "d"]


def test_training_curves_are_plotted_over_epochs_and_named(drawn, tmp_path):
    metrics = [{"step": 5, "loss": 2.0, "accuracy": 0.25}, {"step": 10, "loss": 1.0, "val_top1": 0.5, "val_top5": 0.75}]
    figures.draw_training(tmp_path / "a.png", metrics, steps_per_epoch=5)
    losses, shares = ({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in drawn[0].axes)
    assert losses == {"training": [[1, 2], [2, 1]]}
    assert shares == {"training": [[1, 0.25]], "held-out, top-1": [[2, 0.5]], "held-out, top-5": [[2, 0.75]]}
    assert [axes.get_ylabel() for axes in drawn[0].axes] == [
        "cross-entropy (nats)",
        "accuracy (fraction of samples)",
    ]


def test_the_curve_of_an_attack_begins_with_the_clean_accuracy(drawn, tmp_path):
    figures.draw_attack(tmp_path / "a.png", [0.5, 2], [0.75, 0.25], clean=0.875)
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0.875], [0.5, 0.75], [2, 0.25]]


def test_a_comparison_has_a_bar_for_each_model_and_probe(drawn, tmp_path):
    names = [(model, probe) for model in ("one", "two", "three") for probe in ("knn", "linear")]
    top1 = dict(zip(names, (0.5, 0.625, 0.75, 0.25, 0.375, 0.125)))
    errors = dict(zip(names, (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)))
    rows = [{"model": m, "probe": p, "top1": top1[m, p], "top1_se": errors[m, p]} for m, p in names]
    figures.draw_comparison(tmp_path / "a.png", rows, chance=0.1)
    (axes,) = drawn[0].axes
    probes = [text.get_text() for text in axes.get_xticklabels()]
    bars, spans = {}, []
    for group in (held for held in axes.containers if hasattr(held, "patches")):
        whiskers = group.errorbar.lines[2][0].get_segments()
        for bar, whisker in zip(group, whiskers, strict=True):
            spans.append((bar.get_x(), bar.get_x() + bar.get_width()))
            probe = probes[round(sum(spans[-1]) / 2)]  # the value at the nearest tick
            bars[group.get_label(), probe] = bar.get_height(), np.ptp(whisker[:, 1]) / 2
    assert bars == {name: (top1[name], pytest.approx(errors[name])) for name in names}
    assert all(left[1] < right[0] for left, right in itertools.pairwise(sorted(spans)))
    (line,) = (line for line in axes.lines if line.get_label() == "largest class")
    assert set(line.get_ydata()) == {0.1}


@pytest.mark.parametrize(("metric", "label"), [("top1", "accuracy"), ("map", "mean average precision")])
def test_plotted_accuracies_have_error_bars(drawn, tmp_path, metric, label):
    lines = {"one": [(1, 0.5, 0.125), (10, 0.75, 0.0625)], "two": [(1, 0.25, 0.25)]}
    figures.draw_accuracies(tmp_path / "a.png", lines, "labels", metric)
    (axes,) = drawn[0].axes
    for group, points in zip(axes.containers, lines.values(), strict=True):
        assert group.lines[0].get_xydata().tolist() == [[x, y] for x, y, _ in points]
        ends = [segment[:, 1].tolist() for segment in group.lines[2][0].get_segments()]
        assert ends == [[y - error, y + error] for _, y, error in points]
    assert [group.get_label() for group in axes.containers] == ["one", "two"] and axes.get_xlabel() == "labels"
    assert label in axes.get_ylabel().lower()


def test_a_detection_figure_shows_both_distributions_in_different_colours(drawn, tmp_path):
    inside, outside = {"good": np.arange(5.0) + 10, "bad": np.zeros(5)}, {"good": np.arange(4.0), "bad": np.ones(4)}
    figures.draw_detection(tmp_path / "a.png", inside, outside)
    curves, *panels = drawn[0].axes
    areas = {line.get_label(): auc(line.get_xdata(), line.get_ydata()) for line in curves.lines}
    assert {label.split(" (")[0]: area for label, area in areas.items()} == {"good": 1.0, "bad": 0.0}
    assert [panel.get_title() for panel in panels] == [
        "Score distribution: good",
        "Score distribution: bad",
    ]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["in-distribution (held-out)", "out-of-distribution"]
    centres = [
        np.average([bar.get_x() for bar in bars], weights=[bar.get_height() for bar in bars])
        for bars in panels[0].containers
    ]
    assert centres[0] > centres[1]
    # the area of each histogram is 1, whatever its number of samples
    for bars in (bars for panel in panels for bars in panel.containers):
        assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)


def test_each_cell_of_a_sheet_is_in_its_row_and_column(tmp_path):
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)]]
    cells = [[Cell(torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)) for c in row] for row in colours]
    figures.draw_sheet(tmp_path / "a.png", cells)
    sheet = Image.open(tmp_path / "a.png")
    width, height = sheet.size
    found = [[sheet.getpixel((width * (2 * x + 1) // 4, height * (2 * y + 1) // 4)) for x in (0, 1)] for y in (0, 1)]
    assert found == colours
    figures.draw_sheet(tmp_path / "b.png", [[Cell(cells[0][0].image, "word", GREEN)]], ("title",))
    inks = {colour for _, colour in Image.open(tmp_path / "b.png").getcolors(1 << 20)}
    assert {GREEN, (250, 0, 0)} <= inks and RED not in inks


def test_a_sheet_has_room_for_the_texts_and_titles_of_every_cell(tmp_path):
    """Even the longest texts in every row and column do not overlap an image or another text."""
    green = torch.tensor([0, 250, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    long = "word after word " * 20
    cells = [Cell(green, long, RED), Cell(None, long, RED), Cell(green, "short", RED)]
    figures.draw_sheet(tmp_path / "a.png", [cells] * 2, ("one", "two", "three"))
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    image = (sheet == (0, 250, 0)).all(2)
    assert image.sum() == 4 * figures._SIDE**2
    dark = sheet.sum(2) < 3 * 200
    width, height = figures._SIDE + figures._GAP, (len(sheet) - 20) // 2
    # each column has a title
    assert all(dark[:18, figures._GAP + i * width :][:, : figures._SIDE].any() for i in range(3))
    ink = dark & ~image
    for row in range(2):
        parts = [ink[20 + row * height :][:height, figures._GAP + i * width :][:, :width] for i in range(3)]
        lines = [int((np.diff(part.any(1).astype(int)) == 1).sum()) for part in parts]
        assert lines[0] >= 2 > lines[2] == 1 and lines[1] > 5
        assert not any(part[-2:].any() for part in parts)


def shown_by(names=(), corpora=()):
    """Return a job without images: a sample is the name of its corpus followed by its key, and a cell is the tuple of
    the sample, its text and its colour."""
    return argparse.Namespace(
        out=Path("out"),
        names=names,
        corpora=corpora,
        samples=lambda corpus, keys: {key: f"{corpus}{key}" for key in keys},
        cell=lambda sample, text=None, colour=None: (sample, text, colour),
    )


def on_a_circle(angles: torch.Tensor) -> torch.Tensor:
    """Return features [N, 2] in these directions. Their lengths are arbitrary, because only
    directions matter."""
    return torch.stack((angles.cos(), angles.sin()), 1) * torch.arange(1, len(angles) + 1)[:, None]


def test_neighbour_figures_show_the_most_similar_samples_with_those_of_the_same_class_in_green(monkeypatch):
    """The figure shows eight samples that are evenly spaced over the dataset."""
    sheets, classes = [], ["cat", "dog", "emu"]
    monkeypatch.setattr(knn, "draw_sheet", lambda path, rows, titles: sheets.append(rows))
    random = np.random.RandomState(0)
    angles = [torch.from_numpy(random.rand(count) * 6.28) for count in (30, 20)]
    labels = [torch.from_numpy(random.randint(3, size=count)) for count in (30, 20)]
    bank, asked = (FeatureBank([*range(len(a))], on_a_circle(a), own, None, []) for a, own in zip(angles, labels))
    predicted = torch.from_numpy(random.randint(3, size=20))
    job = shown_by(names=classes, corpora=("train", "val"))
    knn._draw_neighbours(job, (bank, asked), knn._shown(bank, asked), predicted)
    (rows,) = sheets
    assert [row[0][0] for row in rows] == [f"val{20 * number // 8}" for number in range(8)]
    for number, ((_, text, colour), *found) in enumerate(rows):
        mine = 20 * number // 8
        own, taken = int(labels[1][mine]), int(predicted[mine])
        assert text == (classes[own] if own == taken else f"{classes[own]}, predicted as {classes[taken]}")
        assert colour == (GREEN if own == taken else RED)
        nearest = torch.cos(angles[0] - angles[1][mine]).argsort(descending=True)[:7].tolist()
        expected = [(f"train{i}", classes[labels[0][i]], GREEN if labels[0][i] == own else RED) for i in nearest]
        assert found == expected


def test_neighbour_figures_of_lists_of_labels_show_samples_with_a_common_label_in_green(monkeypatch):
    sheets = []
    monkeypatch.setattr(knn, "draw_sheet", lambda path, rows, titles: sheets.append(rows))
    lists = [torch.tensor(own).bool() for own in ([[1, 1, 0], [0, 0, 1], [0, 0, 0]], [[0, 1, 1], [0, 0, 0]])]
    angles = [torch.tensor(own) for own in ([0.0, 0.1, 0.2], [-1.0, 2.0])]
    bank, asked = (FeatureBank([*range(len(a))], on_a_circle(a), own, None, []) for a, own in zip(angles, lists))
    job = shown_by(names=["cat", "dog", "emu"], corpora=("train", "val"))
    knn._draw_neighbours(job, (bank, asked), knn._shown(bank, asked), None)
    neighbours = [("train0", "cat, dog", GREEN), ("train1", "emu", GREEN), ("train2", "", RED)]
    unlike = [(sample, text, RED) for sample, text, _ in neighbours[::-1]]
    assert sheets == [[[("val0", "dog, emu", BLACK), *neighbours], [("val1", "", BLACK), *unlike]]]


def test_a_cell_shows_the_image_or_otherwise_the_caption_and_a_text():
    tokenizer = argparse.Namespace(decode=lambda ids: f"caption {ids}")
    model = argparse.Namespace(tokenizer=tokenizer, config=ModelConfig())
    shown = argparse.Namespace(data=argparse.Namespace(show_channels=None))
    task = argparse.Namespace(model=model, config=shown)
    image, tokens = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([1, 2])
    both, alone = Sample("a", image, tokens=tokens), Sample("a", tokens=tokens)
    cases = [
        (None, "cat", Cell(None)),
        (both, None, Cell(image, "caption [1, 2]", RED)),
        (both, "cat", Cell(image, "cat", RED)),
        (alone, None, Cell(None, "caption [1, 2]", RED)),
        (alone, "cat", Cell(None, "cat: caption [1, 2]", RED)),
        (Sample("a", image), None, Cell(image, "", RED)),
    ]
    for sample, text, expected in cases:
        found = job.Job.cell(task, sample, text, RED)
        assert found._replace(image=None) == expected._replace(image=None)
        torch.testing.assert_close(found.image, expected.image)


def test_the_training_of_a_classifier_is_plotted_by_epochs(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(labelled_task, "draw_training", lambda path, *what: drawn.update(training=(path, *what)))
    monkeypatch.setattr(labelled_task, "read_metrics", lambda folder: [folder])
    trainer = argparse.Namespace(
        config=argparse.Namespace(run=argparse.Namespace(dir=tmp_path)),
        schedule=Schedule(TrainConfig(global_batch=4), OptimConfig(), samples=12),
    )
    labelled_task.LabelledTask.draw(argparse.Namespace(), trainer)
    assert drawn["training"] == (tmp_path / "training.png", [tmp_path], 3)


def test_a_sheet_with_only_captions_is_drawn(tmp_path):
    figures.draw_sheet(
        tmp_path / "sheet.png", [[Cell(None, "a caption"), Cell(None, "another", GREEN)]], ("one", "two")
    )
    assert Image.open(tmp_path / "sheet.png").width > 200
