"""A grey model that is evaluated on colour images."""

import pytest

from m3ae_fast import evaluate
from tests.helpers.labelled import labelled_tar, tiny_run


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_model_warns_that_it_ignores_colours(tmp_path, capsys, channels):
    of_images = {"channels": channels, "image_mean": [0.5] * channels, "image_std": [0.25] * channels}
    run = tiny_run(tmp_path / "run", **of_images)
    shard = str(labelled_tar(tmp_path / "a.tar", range(12)))
    evaluate("knn", run, train=[shard], val=[shard], out=tmp_path / "out", baselines=False)
    warning = "warning: the model reads grey images, so the colours of the images are ignored"
    assert (warning in capsys.readouterr().out) == (channels == 1)


@pytest.mark.slow
def test_a_comparison_names_the_models_that_ignore_colours(tmp_path, capsys):
    grey = tiny_run(tmp_path / "grey", channels=1, image_mean=[0.5], image_std=[0.25])
    colour = tiny_run(tmp_path / "colour")
    shard = str(labelled_tar(tmp_path / "a.tar", range(12)))
    evaluate("compare", [str(grey), str(colour)], train=[shard], val=[shard], out=tmp_path / "out", probes=["knn"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert [line.partition(",")[0] for line in warnings] == ["warning: grey reads grey images"]
