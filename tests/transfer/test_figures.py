"""What the pictures of results show, read from what matplotlib is given and from the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import auc

from m3ae_fast.pictures import figures
from m3ae_fast.pictures.figures import GREEN, RED, Cell


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were saved."""
    kept, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


def points(axes):
    names = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else ["samples"]
    return {
        name: sorted(map(tuple, np.asarray(artist.get_offsets()).tolist()))
        for name, artist in zip(names, axes.collections, strict=True)
    }


def test_a_map_shows_each_sample_as_of_its_class(drawn, tmp_path):
    random = np.random.RandomState(0)
    places, labels = random.randn(40, 2), random.randint(3, size=40)
    panels = [figures.MapPanel("one", places, "told"), figures.MapPanel("two", -places)]
    figures.draw_map(tmp_path / "map.png", panels, labels, ["cat", "dog", "emu"])
    left, right = drawn[0].axes
    for axes, sign in ((left, 1), (right, -1)):
        for number, artist in enumerate(axes.collections):
            np.testing.assert_array_equal(artist.get_offsets(), sign * places[labels == number])
    assert points(right).keys() == {"cat", "dog", "emu"} and left.get_legend() is None
    colours = [[tuple(artist.get_facecolor()[0]) for artist in axes.collections] for axes in (left, right)]
    assert colours[0] == colours[1] and len(set(colours[0])) == 3
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["cat", "dog", "emu"]
    assert [(axes.get_title(), axes.get_xlabel()) for axes in (left, right)] == [("one", "told"), ("two", "")]
    figures.draw_map(tmp_path / "plain.png", [figures.MapPanel("", places)], np.full(40, -1), [])
    assert points(drawn[1].axes[0]) == {"samples": sorted(map(tuple, places.tolist()))}


def test_a_confusion_matrix_has_shares_of_each_label_in_its_row(drawn, tmp_path):
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0, 0, 0, 2, 1, 1])
    figures.draw_confusion(tmp_path / "a.png", labels, predicted, ["a", "b", "c", "d"])
    axes = drawn[0].axes[0]
    expected = np.array([[0.75, 0, 0.25, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c", "d"]


def test_a_training_curve_is_over_epochs_and_by_name(drawn, tmp_path):
    metrics = [{"step": 5, "loss": 2.0, "accuracy": 0.25}, {"step": 10, "loss": 1.0, "val_top1": 0.5, "val_top5": 0.75}]
    figures.draw_training(tmp_path / "a.png", metrics, steps_per_epoch=5)
    losses, shares = ({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in drawn[0].axes)
    assert losses == {"training": [[1, 2], [2, 1]]}
    assert shares == {"training": [[1, 0.25]], "held out, top 1": [[2, 0.5]], "held out, top 5": [[2, 0.75]]}
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss", "accuracy"]


def test_an_attack_begins_with_clean_images(drawn, tmp_path):
    figures.draw_attack(tmp_path / "a.png", [0.5, 2], [0.75, 0.25], clean=0.875)
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0.875], [0.5, 0.75], [2, 0.25]]


def test_a_detection_shows_which_samples_are_which(drawn, tmp_path):
    familiar, strange = {"good": np.arange(5.0) + 10, "bad": np.zeros(5)}, {"good": np.arange(4.0), "bad": np.ones(4)}
    figures.draw_detection(tmp_path / "a.png", familiar, strange)
    curves, *panels = drawn[0].axes
    areas = {line.get_label(): auc(line.get_xdata(), line.get_ydata()) for line in curves.lines}
    assert {label.split(" (")[0]: area for label, area in areas.items()} == {"good": 1.0, "bad": 0.0}
    assert [panel.get_title() for panel in panels] == ["good", "bad"]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == ["validation", "other"]
    centres = [
        np.average([bar.get_x() for bar in bars], weights=[bar.get_height() for bar in bars])
        for bars in panels[0].containers
    ]
    assert centres[0] > centres[1]


def test_a_sheet_has_each_cell_in_its_row_and_column(tmp_path):
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


def test_neighbours_are_green_where_they_are_of_the_samples_class(transfer, monkeypatch):
    sheets = []
    monkeypatch.setattr("m3ae_fast.transfer.knn.draw_sheet", lambda path, rows, titles: sheets.append(rows))
    monkeypatch.setattr("m3ae_fast.transfer.knn.draw_confusion", lambda *_: None)
    transfer("knn", "--labels", "json.name", *("--set", "knn.k=3"))
    (rows,) = sheets
    assert len(rows) == 8 and all(len(row) == 8 for row in rows)
    for asked, *neighbours in rows:
        tint = asked.image.float().mean((1, 2))
        for cell in neighbours:  # each image shows the colour that its class is called
            assert cell.text == ("red", "green", "blue")[int(cell.image.float().mean((1, 2)).argmax())]
            assert cell.colour == (GREEN if cell.text == asked.text.split(",")[0] else RED)
        assert asked.text.split(",")[0] == ("red", "green", "blue")[int(tint.argmax())]


def test_what_is_found_is_green_where_it_is_the_own_one(transfer, monkeypatch):
    sheets = {}
    monkeypatch.setattr(
        "m3ae_fast.transfer.retrieval.draw_sheet", lambda path, rows, titles: sheets.__setitem__(path.stem, rows)
    )
    transfer("retrieval", train=None)
    assert {*sheets} == {"text_to_image", "image_to_text"}
    for name, rows in sheets.items():
        images_asked = name == "image_to_text"
        for asked, *found in rows:
            assert (asked.image is not None) == images_asked and len(found) == 5
            assert all((cell.image is None) == images_asked for cell in found)
            assert sum(cell.colour == GREEN for cell in found) <= 1
