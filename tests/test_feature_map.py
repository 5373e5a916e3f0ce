"""A feature map shows the same samples for several runs, with a measure of the separation of their classes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.draw import main
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.labels import keep_classes, label_corpus
from m3ae_fast.evaluation import feature_map
from m3ae_fast.evaluation.feature_map import separation
from tests.helpers.labelled import labelled_members, labelled_tar, tiny_run
from tests.helpers.shards import write_tar


def test_the_separation_of_classes_equals_that_of_scikit_learn():
    random = np.random.RandomState(0)
    labels = random.choice([0, 2, 3], 60)
    points = random.randn(60, 2) + labels[:, None]
    for neighbours in (1, 5, 10):
        judge = KNeighborsClassifier(neighbours)
        expected = cross_val_score(judge, points, labels, cv=LeaveOneOut()).mean()
        found = separation(points, labels, neighbours)
        assert found == pytest.approx((silhouette_score(points, labels), expected, neighbours))
    assert 0.3 < expected < 0.9


def test_the_separation_of_classes_equals_a_value_computed_by_hand():
    """There are two pairs of points, one per class. The distance within a pair is 1, and the distances to the points of
    the other class are 10 and 11, or 9 and 10."""
    found = separation(np.array([[0.0, 0], [1, 0], [10, 0], [11, 0]]), np.array([0, 0, 1, 1]), 1)
    assert found == pytest.approx((np.mean([1 - 1 / 10.5, 1 - 1 / 9.5]), 1.0, 1))
    assert str(found) == "silhouette 0.900, 1-NN accuracy 100.0 %"
    alone = separation(np.arange(8.0).reshape(4, 2), np.arange(4))
    assert np.isnan(alone.silhouette) and alone[1:] == (0.0, 3)


@pytest.fixture
def runs(tmp_path):
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(str(tiny_run(tmp_path / f"run-{seed}")))
    return found


@pytest.mark.slow
def test_feature_maps_of_several_runs_are_drawn_side_by_side(runs, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(feature_map, "draw_map", lambda *args: given.append(args))
    val = labelled_tar(tmp_path / "val.tar", range(30))
    base = ["map", *runs, "--val", val, "--labels", "json.name"]
    assert main([*base, "--classes", "red,blue"]) == 0
    ((path, panels, labels, classes),) = given
    assert str(path) == f"{runs[0]}/map.png" and classes == ["red", "blue"]
    assert labels.tolist() == [1, 0] * 10  # samples are blue, green, red, blue, ...
    assert [panel.title for panel in panels] == runs
    captions = [f"{separation(panel.places_N2, labels)}, 20 samples" for panel in panels]
    assert [panel.caption for panel in panels] == captions and "10-NN" in captions[0]
    assert not np.array_equal(panels[0].places_N2, panels[1].places_N2)
    assert f"{runs[1]}: {captions[1]}" in capsys.readouterr().out
    main([*base[:2], *base[3:], "--classes", "red,blue"])
    ((_, alone, _, _),) = given[1:]
    np.testing.assert_array_equal(alone[0].places_N2, panels[0].places_N2)  # a map is independent of other runs


def test_a_feature_map_is_drawn_if_some_classes_have_no_samples(runs, tmp_path, monkeypatch):
    """A few held-out samples, whose class numbers have gaps, are plotted."""
    given = []
    monkeypatch.setattr(feature_map, "draw_map", lambda *args: given.append(args))
    shards = labelled_tar(tmp_path / "val.tar", [1, 2, 4, 5, 7])
    (tmp_path / "classes.json").write_text('["blue", "green", "red"]')
    assert main(["map", runs[0], "--val", shards, "--labels", "cls"]) == 0
    ((*_, labels, names),) = given
    assert labels.tolist() == [0, 1, 0, 1, 0] and names == ["green", "red"]


@pytest.mark.slow
def test_the_width_of_a_feature_map_grows_with_its_panels(runs, tmp_path):
    val = labelled_tar(tmp_path / "val.tar", range(12))
    widths = []
    for models in (runs[:1], [*runs, f"random:{runs[0]}"]):
        assert main(["map", *models, "--val", val, "--out", str(tmp_path / "a.png")]) == 0
        widths.append(Image.open(tmp_path / "a.png").width)
    assert widths[1] > 2 * widths[0]


def test_selected_classes_are_numbered_in_the_given_order(tmp_path):
    sources = [SourceConfig(shards=labelled_tar(tmp_path / f"{i}.tar", range(i, i + 7, 1 + i // 2))) for i in (0, 2)]
    labelled, classes = label_corpus(open_corpus(sources, ShardStore(tmp_path)), "cls")
    kept, names = keep_classes(labelled, classes, ["2", "0"])
    assert names == [2, 0]
    assert [source.labels.tolist() for source in kept.sources] == [[1, 0, 1, 0, 1], [0, 1, 0]]
    assert [shard.table()["key"].tolist() for source in kept.sources for shard in source.shards] == [
        [b"00000", b"00002", b"00003", b"00005", b"00006"], [b"00002", b"00006", b"00008"],
    ]  # fmt: skip


def test_user_errors_are_reported_in_one_line(runs, tmp_path, capsys):
    val = labelled_tar(tmp_path / "val.tar", range(9))
    base = ["map", *runs, "--val", val, "--out", str(tmp_path / "out.png")]
    for options, message in (
        (["--classes", "0,5"], "no sample has the class '5'; the classes are 0, 1, 2"),
        (["--classes", "1"], "classes 1: specify at least two classes, and each class only once"),
        (["--classes", "1,1"], "classes 1, 1: specify at least two classes"),
    ):
        with pytest.raises(UserError, match=message):
            main([*base, *options])
    with pytest.raises(UserError, match="RUN"):
        main(["map"])
    grey = tiny_run(tmp_path / "grey", image_range=(0, 9))
    deep = write_tar(tmp_path / "deep.tar", [*labelled_members(range(9)), *_deep()])
    with pytest.raises(UserError, match="grey: cannot read the same samples as"):
        main(["map", runs[0], str(grey), "--val", deep, "--out", str(tmp_path / "out.png")])
    assert not (tmp_path / "out.png").exists()


def _deep():
    """Return a 16-bit sample, which a model with an image range reads."""
    out = io.BytesIO()
    Image.fromarray(np.full((40, 40), 5, np.uint16)).save(out, "PNG")
    return [("99999.png", out.getvalue()), ("99999.cls", b"0")]
