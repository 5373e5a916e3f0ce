"""Runs that end when the k-NN accuracy reaches a target or no longer improves: the criterion, and the decay that
follows."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.status import status
from m3ae_fast.config import Config, parse
from m3ae_fast.training.early_stopping import ACCURACY, EarlyStopping
from m3ae_fast.training.extension import is_extended
from tests.helpers.labelled import labelled_tar
from tests.helpers.trainer import TINY
from tests.test_stable_schedule import schedule


def stopping_after(stop_at, accuracies):
    """Return the criterion after these accuracies, one per 10 steps."""
    stopping = EarlyStopping(stop_at)
    why = [stopping.add(10 * number, accuracy) for number, accuracy in enumerate(accuracies)]
    return stopping.step, [text for text in why if text]


def test_a_run_ends_once_the_target_accuracy_is_reached():
    """The accuracy of random weights is ignored. The first accuracy that reaches the target decides."""
    step, why = stopping_after(0.5, [0.9, 0.4, 0.5, 0.7])
    assert step == 20 and why == ["the k-NN accuracy of 0.5 reaches train.stop_at=0.5"]
    assert stopping_after(0.5, [0.1, 0.2, 0.3]) == (None, [])


def test_a_run_ends_once_the_accuracy_stops_improving():
    step, why = stopping_after("plateau", [0.9, 0.3, 0.5, 0.5, 0.4, 0.5, 0.6])
    assert step == 50 and why == ["the k-NN accuracy has not exceeded 0.5 in 3 evaluations"]
    assert stopping_after("plateau", [0.3, 0.5, 0.4, 0.4, 0.6, 0.5, 0.5])[0] is None


@pytest.mark.parametrize("decay", [0.01, 0.2, 0.5, 0.9])
def test_the_decay_begins_at_the_step_that_reached_the_accuracy(decay):
    plan = schedule(1000, decay)
    stopping = EarlyStopping(0.5)
    assert stopping.total_steps(10, plan, 1000) == 1000
    for step in (1, 2, 3, 5, 7, 50, 99):
        stopping = EarlyStopping(0.5)
        stopping.add(step, 0.5)
        shorter = plan.changed(step, stopping.total_steps(step, plan, 1000))
        assert shorter.decay_begin == step < shorter.total_steps and shorter.lr(step) == 1
        for later in range(step, shorter.total_steps):  # it does not change, even if a time limit has time left
            assert stopping.total_steps(later, shorter, 5000) == shorter.total_steps
        assert stopping.total_steps(step, shorter, step + 1) == step + 1  # it changes if a time limit has no time left


def test_a_run_that_has_begun_to_decay_keeps_its_length():
    plan, stopping = schedule(100), EarlyStopping(0.5)
    stopping.add(90, 0.9)
    assert stopping.total_steps(90, plan, 100) == 100


def test_stop_at_requires_a_probe_and_a_decay():
    probe = {"train": [{"shards": "a.tar"}], "val": [{"shards": "b.tar"}], "every": 5}

    def config(optim, **train):
        return parse(Config, TINY | {"optim": optim, "train": TINY["train"] | train}, "test")

    assert config({"schedule": "wsd"}, stop_at="plateau", probe=probe).train.stop_at == "plateau"
    for optim in ({}, {"schedule": "wsd", "decay_fraction": 1.0}):
        with pytest.raises(UserError, match=r"train\.stop_at needs a decay .*: set optim\.schedule to wsd"):
            config(optim, stop_at=0.5, probe=probe)
    for given in ({}, {"probe": probe | {"every": None}}):
        with pytest.raises(UserError, match=r"set train\.probe\.every"):
            config({"schedule": "wsd"}, stop_at=0.5, **given)
    for wrong in (0.0, 60, "never"):
        with pytest.raises(UserError, match=r"train\.stop_at"):
            config({"schedule": "wsd"}, stop_at=wrong, probe=probe)


@pytest.mark.parametrize(
    ("was", "now", "longer"),
    [(0.5, 0.6, True), (0.5, None, True), (0.5, "plateau", True), ("plateau", None, True), (0.5, 0.4, False),
     (0.5, 0.5, False), (None, 0.5, False), ("plateau", "plateau", False)],
)  # fmt: skip
def test_a_run_with_a_higher_target_resumes_from_before_its_decay(was, now, longer):
    config = SimpleNamespace(optim=SimpleNamespace(decay=0.2), train=SimpleNamespace(stop_at=now, **LENGTHS))
    info = SimpleNamespace(config={"train": {"stop_at": was, **LENGTHS}})
    assert is_extended(config, info) == longer


LENGTHS = {"steps": 10, "epochs": None, "hours": None}


@pytest.mark.parametrize("key", LENGTHS)
@pytest.mark.parametrize(
    ("now", "decay", "longer"), [(12, 0.2, True), (10, 0.2, False), (8, 0.2, False), (12, None, False)]
)
def test_only_an_extended_run_resumes_from_before_its_decay(key, now, decay, longer):
    was, present = ({**dict.fromkeys(LENGTHS), key: value, "stop_at": None} for value in (10, now))
    config = SimpleNamespace(optim=SimpleNamespace(decay=decay), train=SimpleNamespace(**present))
    assert is_extended(config, SimpleNamespace(config={"train": was})) == longer


@pytest.mark.slow
def test_a_run_on_several_ranks_that_stops_early_resumes_bitwise_identically(trainer, tmp_path):
    """The accuracy is reached at the first evaluation, after 4 of 30 steps."""
    shards = str(labelled_tar(tmp_path / "labelled.tar", range(12)))
    source = [{"shards": shards, "modality": "image"}]
    probe = json.dumps({"train": source, "val": source, "every": 4})
    options = [
        "optim.schedule=wsd", "optim.decay_fraction=0.5", f"train.probe={probe}", "train.steps=30", "train.keep=9",
        "train.save_every=3", "data.workers=0",
    ]  # fmt: skip
    options = [word for option in options for word in ("--set", option)]
    stops = ["--set", "train.stop_at=0.01"]
    out = trainer("one", *options, *stops)
    assert "reaches train.stop_at=0.01: the learning rate decays from step 4 on, and the run then ends" in out
    folder = trainer.folder / "one"
    assert status(folder) == ("finished", "finished at step 8 of 8")
    assert trainer.lines("one", "total_steps") == [(4, 8)]
    rates = [rate for _, rate in trainer.lines("one", "lr")]
    assert rates[:5] == [rates[0]] * 5 and rates[5:] == sorted(rates[5:], reverse=True) and rates[5] < rates[4]
    assert [step for step, _ in trainer.lines("one", ACCURACY)] == [0, 4, 8]
    assert trainer.checkpoints("one") == [f"step-{step:08}" for step in (3, 4, 6, 8)]  # step 4 is before the decay
    whole = trainer.losses("one")
    for last in (3, 4, 6):
        for path in checkpoint.saved_steps(folder):
            if checkpoint.step_of(path) > last:
                shutil.rmtree(path)
        trainer("one", *options, *stops, "--resume", "auto")
        assert trainer.losses("one") == whole and len(whole) == 8
    trainer("two", *options, *stops, ranks=2)
    assert trainer.lines("two", "total_steps") == [(4, 8)]
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(whole), rtol=2e-5)
    later = ["--set", "train.steps=12", "--set", "train.stop_at=null"]
    trainer("one", *options, *later, "--resume", "auto")  # returns to step 4
    assert trainer.losses("one")[:4] == whole[:4] and len(trainer.losses("one")) == 12
    again = trainer("two", *options, *stops, "--resume", "auto")
    assert "it was ended by train.stop_at=0.01: raise train.stop_at or set it to null to continue" in again
