import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m3ae_fast.cli.evaluate import main
from m3ae_fast.config.evaluation import FINETUNE
from m3ae_fast.evaluation.baseline_results import UNTRAINED
from m3ae_fast.evaluation.compare_results import compare_results
from m3ae_fast.evaluation.significance import Difference
from m3ae_fast.evaluation.tasks import TASKS, WithBaselines
from tests.helpers.labelled import labelled_tar, tiny_run


def settings(*overrides):
    """Return `--set` options."""
    return [word for override in overrides for word in ("--set", override)]


def finetune_settings(**values):
    """Return `--set` options for settings of fine-tuning. The names of the settings are given without their section."""
    sections = {key: section for section in ("finetune", "optim", "train") for key in FINETUNE.keys(section)}
    return settings(*(f"{sections[key]}.{key}={json.dumps(value)}" for key, value in values.items()))


def figure_names(folder):
    """Return the names of the figures in the folder of a result. Require that TensorBoard's files contain them too."""
    names = sorted(path.stem for path in folder.glob("*.png"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert set(names) <= set(events.Tags()["images"])
    return names


def same_as_baseline(transfer, folder, task, *options, **more):
    """Evaluate the tiny run with its baselines, and random weights alone. Return the sentence of `compare` about the
    two results, and the sentence of the first result about its baseline with random weights."""
    options = [*options, *settings("run.seed=0")]  # the seed of the bootstrap of `compare`
    result = transfer(task, *options, out="one", baselines=True, **more)
    transfer(task, *options, out="other", model=f"random:{result['model']}", **more)
    names = [str(folder / name) for name in ("one", "other")]
    difference = Difference.read(result["baselines"][UNTRAINED]["difference"])
    return compare_results([*map(Path, names)]), difference.words(*names)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Return a run folder."""
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Return training and validation shards with three classes."""
    folder = tmp_path_factory.mktemp("shards")
    return labelled_tar(folder / "train.tar", range(48)), labelled_tar(folder / "val.tar", range(100, 118))


@pytest.fixture
def transfer(run, shards, tmp_path):
    """Return a function transfer(task, *options, ...), which runs a task, by default without baselines, and returns the
    content of result.json."""

    def perform(task, *options, model=run, train=shards[0], val=shards[1], out="out", baselines=False):
        alone = [] if baselines or not issubclass(TASKS[task], WithBaselines) else ["--no-baselines"]
        data = ["--val", val] + (["--train", train] if train else [])
        fixed = ["--out", str(tmp_path / out), "--set", "data.workers=0"]
        assert main([task, str(model), *data, *fixed, *alone, *options]) == 0
        return json.loads((tmp_path / out / "result.json").read_text())

    return perform
