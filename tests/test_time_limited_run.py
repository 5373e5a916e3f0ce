"""Real runs with a time limit on a simulated clock: every rank ends at the same step, and a killed run is resumed."""

import shutil

import numpy as np
import pytest

from m3ae_fast import checkpoint
from m3ae_fast.training.run_state import status
from tests.helpers.ranks import run_ranks
from tests.helpers.slow_steps import STEP_S

pytestmark = pytest.mark.slow

STEPS = 24  # number of steps that fit; 60 were planned
OPTIONS = ["train.steps=60", f"train.hours={STEPS * STEP_S / 3600}", "train.save_every=2", "train.keep=30"]
OPTIONS += ["train.log_every=1", "data.workers=0"]


def train(trainer, run, *options, ranks=1):
    settings = [word for option in (*OPTIONS, *options) for word in ("--set", option)]
    trainer.log(run).unlink(missing_ok=True)
    arguments = trainer.arguments(run, *settings, "--resume", "auto")
    code, out = run_ranks("tests.helpers.slow_steps", arguments, ranks, trainer.log(run))
    assert code == 0, out
    return out


def test_a_time_limited_run_ends_in_time_and_resumes_bitwise_identically_after_a_kill(trainer):
    out = train(trainer, "run")
    assert f"steps 0 to 60, adjusted to train.hours={STEPS * STEP_S / 3600:g}" in out
    whole = trainer.lines("run", "loss", "grad_norm", "lr")
    assert [step for step, *_ in whole] == list(range(1, STEPS + 1))
    folder = trainer.folder / "run"
    assert status(folder) == ("finished", f"finished at step {STEPS} of {STEPS}")
    ((at, total),) = trainer.lines("run", "total_steps")
    info = checkpoint.read_info(checkpoint.locate(folder))
    assert total == STEPS and info.changes == [(at, total)] and info.spent == STEPS * STEP_S
    assert [step for step, _ in trainer.lines("run", "val_image_loss")] == [0, STEPS]
    rates = [rate for *_, rate in whole]
    assert min(rates) == rates[-1] < 0.02 * max(rates)
    assert "training is complete; set train.hours=null and raise" in train(trainer, "run")
    assert trainer.lines("run", "loss", "grad_norm", "lr") == whole
    for step in (STEPS - 6, at - 2):  # after the change of the number of steps, and before it
        for path in checkpoint.saved_steps(folder):
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)
        train(trainer, "run")
        found = trainer.lines("run", "loss", "grad_norm", "lr")
        assert found[:step] == whole[:step] and len(found) in (STEPS, STEPS - 1, STEPS + 1)
        if step > at:
            assert found == whole


def test_the_main_rank_determines_the_number_of_steps_for_all_ranks(trainer):
    for run, ranks in (("one", 1), ("two", 2)):
        train(trainer, run, ranks=ranks)
    assert trainer.lines("one", "total_steps") == trainer.lines("two", "total_steps") != []
    one, two = (np.array(trainer.lines(run, "loss", "lr")) for run in ("one", "two"))
    assert len(one) == STEPS
    np.testing.assert_allclose(two, one, rtol=2e-5)


def test_a_run_resumed_with_less_time_than_it_has_used_ends_soon(trainer):
    train(trainer, "run")
    for path in checkpoint.saved_steps(trainer.folder / "run"):
        if checkpoint.step_of(path) > 12:
            shutil.rmtree(path)
    out = train(trainer, "run", f"train.hours={6 * STEP_S / 3600}")
    assert "train.hours was 0.06666666666666667 and is 0.016666666666666666 from here on" in out
    step, *_ = trainer.lines("run", "lr")[-1]
    assert 12 < step <= 15 and checkpoint.step_of(checkpoint.locate(trainer.folder / "run")) == step
