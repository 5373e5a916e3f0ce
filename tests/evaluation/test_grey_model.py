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
