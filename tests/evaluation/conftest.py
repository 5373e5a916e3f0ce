import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m3ae_fast.cli.evaluate import main
from tests.helpers.labelled import labelled_tar, tiny_run


def settings(*overrides):
    """--set options."""
    return [word for override in overrides for word in ("--set", override)]


def pictures(folder):
    """Names of the PNGs of a result, which TensorBoard has too."""
    names = sorted(path.stem for path in folder.glob("*.png"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert set(names) <= set(events.Tags()["images"])
    return names


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder."""
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Training and validation shards of three classes."""
    folder = tmp_path_factory.mktemp("shards")
    return labelled_tar(folder / "train.tar", range(48)), labelled_tar(folder / "val.tar", range(100, 118))


@pytest.fixture
def transfer(run, shards, tmp_path):
    """transfer(task, *options, ...) -> what result.json holds."""

    def perform(task, *options, model=run, train=shards[0], val=shards[1], out="out"):
        data = ["--val", val] + (["--train", train] if train else [])
        fixed = ["--out", str(tmp_path / out), "--set", "data.workers=0"]
        assert main([task, str(model), *data, *fixed, *options]) == 0
        return json.loads((tmp_path / out / "result.json").read_text())

    return perform
