"""Runs that return to a good checkpoint and skip the batch of a step that was not finite or a spike."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast import train as program
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import resuming
from m3ae_fast.config import Config, parse
from m3ae_fast.process.session import joined_program
from m3ae_fast.training import loss_watch
from m3ae_fast.training import run as run_module
from m3ae_fast.training.loss_watch import Diverged
from m3ae_fast.training.metrics_log import SilentLog
from m3ae_fast.training.rollback import _return_to
from m3ae_fast.training.run import pre_train
from m3ae_fast.training.time_limit import TimeLimit
from m3ae_fast.training.trainer import batch_of
from tests.helpers.checkpoints import save
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import TINY

STEPS, BATCH = 8, 8


def test_steps_use_the_batches_that_are_not_skipped():
    assert [batch_of(step, ()) for step in range(4)] == [0, 1, 2, 3]
    assert [batch_of(step, (5, 2, 3)) for step in range(5)] == [0, 1, 4, 6, 7]
    assert [batch_of(step, (0, 1)) for step in range(2)] == [2, 3]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains a run in which the losses of the samples `bad` are `loss`, and returns the keys of
    each step's samples. Its attribute `sides` contains the size of each step's images."""
    source = [{"shards": write_tar(tmp_path / "p.tar", members(range((STEPS + 3) * BATCH)))}]
    build = run_module.build_engine

    def perform(run, bad=(), resume="no", loss=math.nan, **changes):
        data = json.loads(json.dumps(TINY))
        data["run"] = {"dir": str(tmp_path / run)}
        data["data"] |= {"train": source, "val": [], "workers": 0, "cache_dir": str(tmp_path / "cache")}
        data["train"] |= {"global_batch": BATCH, "micro_batch": BATCH, "steps": STEPS, "save_every": 2, "keep": 9}
        data["train"] |= changes
        taken, perform.sides = [], []

        class Spoilt:
            def __init__(self, *args):
                self.engine = build(*args)

            def __getattr__(self, name):
                return getattr(self.engine, name)

            def step(self, batches, counts, lr):
                keys = [key.rpartition("/")[2] for batch in batches for key in batch.keys]
                taken.append(keys)
                perform.sides.append(batches[0].images.shape[-1])
                losses, norm = self.engine.step(batches, counts, lr)
                if {*bad} & {*keys}:
                    losses[-1] = losses[-1]._replace(loss=torch.tensor(loss))
                return losses, norm

        monkeypatch.setattr(run_module, "build_engine", Spoilt)
        with joined_program() as session:
            pre_train(parse(Config, data, "test"), session, resume=resume)
        return taken

    return perform


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]


def test_time_before_a_rollback_counts_towards_the_time_limit(tmp_path, monkeypatch):
    """The time of the repeated steps counts, although the checkpoint does not store it."""
    limits, resumed = [], []

    def set_up(*given):
        resumed.append(given[1])
        trainer = SimpleNamespace(limit=TimeLimit(3600), left_out=given[6] or (), log=SilentLog())

        def train(folder):
            limits.append(trainer.limit)
            if len(limits) < 3:
                trainer.limit._began -= 600
                raise Diverged("the loss of step 3 is not finite", "", len(limits))

        trainer.train = train
        return trainer

    monkeypatch.setattr(run_module, "set_up", set_up)
    data = TINY | {"run": {"dir": str(tmp_path / "run")}, "train": TINY["train"] | {"rollbacks": 2, "hours": 1.0}}
    with joined_program() as session:
        pre_train(parse(Config, data, "test"), session, resume="other")
    assert resumed == ["other"] * 3  # there is no checkpoint of this run
    assert [limit.seconds for limit in limits] == [3600] * 3 and 1200 <= limits[-1].spent < 1800


def test_a_rollback_returns_to_the_last_good_checkpoint_or_to_the_start(tmp_path):
    """A run that started from a checkpoint of another run returns to that checkpoint. Failed checkpoints are set
    aside, because they would be in the way of a new start."""
    other = save(tmp_path / "other", {"model/w": torch.ones(3)}, checkpoint.Info(4, 0, 42, {}, {}))
    run = tmp_path / "run"
    for resume in ("no", "auto", str(other)):
        assert _return_to(run, resume) == resume
    save(run, {"model/w": torch.ones(3)}, checkpoint.Info(2, 0, 42, {}, {}))
    assert _return_to(run, str(other)) == "auto"
    checkpoint.mark(run, 2, checkpoint.FAILED, "the loss of step 3 is not finite")
    assert _return_to(run, str(other)) == str(other)
    assert checkpoint.saved_steps(run) == [] and resuming.find(run, str(other)) == other


WHOLE: list[list[str]] = []


def whole_keys(train):
    """Return the keys of each step's samples in a run that skips no batch. The run is trained once for all tests."""
    if not WHOLE:
        WHOLE[:] = train("whole")
    return WHOLE


@pytest.mark.slow
def test_a_run_that_skipped_batches_resumes_bitwise_identically(train, tmp_path, capsys):
    WHOLE[:] = whole = train("whole")
    bad = whole[4][3], whole[6][0]
    with pytest.raises(UserError, match=r"the loss of step 6 is not finite; .* the last good checkpoint"):
        train("one", bad, rollbacks=1)  # too few rollbacks for the seventh batch
    taken = train("run", bad, rollbacks=2)
    out = capsys.readouterr().out
    assert "the loss of step 5 is not finite" in out and "batch 4 is skipped" in out and "batch 6 is skipped" in out
    assert [line.partition(";")[0] for line in out.splitlines() if line.startswith("Open: ")] == [
        f"Open: train.rollbacks (batches left out: {batches})" for batches in ("4", "4", "4, 6")
    ]
    first, second = taken.index(whole[4]), taken.index(whole[6])
    assert taken[:first] == whole[:4]
    assert taken[-3:-1] != whole[6:8] and whole[4] not in taken[second + 1 :] and whole[6] not in taken[second + 1 :]
    found = losses(tmp_path / "run")
    assert [step for step, *_ in found] == [*range(1, STEPS + 1)] and all(math.isfinite(loss) for _, loss, _ in found)
    assert found[:4] == losses(tmp_path / "whole")[:4]
    assert [rate for *_, rate in found] == [rate for *_, rate in losses(tmp_path / "whole")]
    last = checkpoint.saved_steps(tmp_path / "run")[-1]
    assert checkpoint.step_of(last) == STEPS and checkpoint.read_info(last).left_out == [4, 6]
    for keep in (6, 4):  # after both spikes, and before them
        for path in checkpoint.saved_steps(tmp_path / "run"):
            if checkpoint.step_of(path) > keep:
                shutil.rmtree(path)
        again = train("run", bad, "auto", rollbacks=2)
        assert losses(tmp_path / "run") == found
        assert keep == 4 or len(again) == 2


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 2])
def test_a_run_without_a_good_checkpoint_rolls_back_to_its_start(train, tmp_path, batch):
    """The failed step is before the first checkpoint or right after it."""
    taken = train("run", whole_keys(train)[batch][:1], rollbacks=1)
    whole = whole_keys(train)
    assert taken[batch] == whole[batch] and taken[batch + 1 :] == whole[:batch] + taken[-STEPS + batch :]
    assert taken[-STEPS:-1] == whole[:batch] + whole[batch + 1 :] and len(losses(tmp_path / "run")) == STEPS
    assert checkpoint.step_of(checkpoint.saved_steps(tmp_path / "run")[-1]) == STEPS


@pytest.mark.slow
def test_a_run_rolls_back_after_loss_spikes_up_to_the_maximum_number_of_rollbacks(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_watch, "WINDOW", 3)
    whole, settings = whole_keys(train), {"rollbacks": 1, "spike_threshold": 100.0}
    bad = whole[4][3], whole[6][0]
    taken = train("run", bad, loss=1e6, **settings)
    out = capsys.readouterr().out
    assert "the loss of step 5 is a spike: 1e+06, but the previous 3 losses were" in out and "batch 4 is skipped" in out
    assert whole[6] in taken[taken.index(whole[4]) + 1 :] and "batch 6 is skipped" not in out
    found = losses(tmp_path / "run")
    assert [step for step, loss, _ in found if loss > 1e5] == [6] and len(found) == STEPS
    early, *late = checkpoint.saved_steps(tmp_path / "run")[1:]
    assert len(checkpoint.read_info(early).recent_losses) == 3
    for path in late:  # the run returns to a step before the spike
        shutil.rmtree(path)
    train("run", bad, "auto", loss=1e6, **settings)
    assert losses(tmp_path / "run") == found and checkpoint.read_info(late[-1]).left_out == [4]


def main(argv):
    """Train as the program does. The loss is a spike on the rank with the sample at the given position of the stream,
    and is compared with the previous four losses."""
    position, *arguments = argv
    build = run_module.build_engine

    def spoilt(*args):
        engine = build(*args)
        step = engine.step

        def take(batches, counts, lr):
            losses, norm = step(batches, counts, lr)
            if any(int(position) in batch.positions for batch in batches):
                losses[-1] = losses[-1]._replace(loss=torch.tensor(1e6))
            return losses, norm

        engine.step = take
        return engine

    run_module.build_engine, loss_watch.WINDOW = spoilt, 4
    return program.main(arguments)


@pytest.mark.slow
def test_two_ranks_roll_back_together_as_one_rank_does(trainer):
    """The spike is in batch 6, on one of the ranks. The checkpoint contains the mean losses of both ranks, of which the
    first is compared while training continues, and the others before the save."""
    options = ["train.rollbacks=1", "train.spike_threshold=100", "train.save_every=5", "train.steps=10"]
    options = [word for option in (*options, "data.workers=0") for word in ("--set", option)]
    losses, recent = [], []
    for run, ranks in (("one", 1), ("two", 2)):
        arguments = [str(6 * 16 + 1), *trainer.arguments(run, *options)]
        code, out = run_ranks(__name__, arguments, ranks, trainer.log(run))
        assert code == 0 and out.count("batch 6 is skipped") == 1, out
        losses.append(trainer.losses(run))
        infos = [checkpoint.read_info(path) for path in checkpoint.saved_steps(trainer.folder / run)]
        assert [(info.step, info.left_out) for info in infos] == [(5, []), (10, [6])]
        recent.append(infos[0].recent_losses)
    assert [step for step, *_ in losses[0]] == [*range(1, 11)] and len(recent[0]) == 4
    np.testing.assert_allclose(np.array(losses[1]), np.array(losses[0]), rtol=2e-5)
    np.testing.assert_allclose(recent[1], recent[0], rtol=2e-5)


def test_spike_detection_requires_rollbacks():
    for changes, message in (({}, "train.spike_threshold needs rollbacks to a checkpoint: set train.rollbacks"),):
        with pytest.raises(UserError, match=message):
            parse(Config, TINY | {"train": TINY["train"] | {"spike_threshold": 6.0} | changes}, "test")
