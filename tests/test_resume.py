"""Runs that are killed, stopped or moved go on as if nothing had happened."""

import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from m3ae_fast.engine import checkpoint
from tests.helpers.trainer import zero

SAVE = ["--set", "train.save_every=2", "--set", "train.keep=9"]


def _cut(trainer, run: str, step: int) -> None:
    """Make `run` look as if it had died after the checkpoint of `step`."""
    for path in checkpoint.saved_steps(trainer.folder / run):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_resume_is_bitwise(trainer, stage):
    """In bf16 too, where weights are rounded copies of float32 masters."""
    options = [*zero(stage), *SAVE, "--set", "train.precision=bf16"]
    trainer("run", *options)
    whole = trainer.losses("run")
    _cut(trainer, "run", 4)
    trainer("run", *options, "--resume", "auto")
    assert trainer.losses("run") == whole


@pytest.mark.parametrize(("stage", "ranks", "then_stage", "then_ranks"), [(3, 2, 1, 1), (1, 1, 3, 2), (None, 1, 2, 2)])
def test_resume_on_other_ranks_and_stage(trainer, stage, ranks, then_stage, then_ranks):
    trainer("run", *zero(stage), *SAVE, ranks=ranks)
    whole = np.array(trainer.losses("run"))
    _cut(trainer, "run", 4)
    trainer("run", *zero(then_stage), *SAVE, "--resume", "auto", ranks=then_ranks)
    np.testing.assert_allclose(np.array(trainer.losses("run")), whole, rtol=2e-5)


def test_sigkill_anywhere(trainer):
    """Killed at three arbitrary moments, then finished: bit for bit the run that nobody touched."""
    options = ["--set", "train.steps=40", "--set", "train.save_every=1"]
    trainer("whole", *options)
    for delay in (0.05, 0.4, 0.9):
        process = trainer.start("killed", *options, "--resume", "auto")
        metrics = trainer.folder / "killed/metrics.jsonl"
        before = metrics.read_text() if metrics.exists() else ""
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text()) <= len(before)):
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.communicate()
    trainer("killed", *options, "--resume", "auto")
    assert trainer.losses("killed") == trainer.losses("whole")


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ["data.workers=0"]),
        (signal.SIGTERM, ["data.workers=3", "train.eval_every=1", "train.eval_samples=1000"]),  # nearly always in one
        (signal.SIGUSR1, ["data.workers=1", "train.save_every=1"]),
    ],
)
def test_signals_to_the_process_group_save_and_leave(trainer, number, options):
    options = ["train.steps=100000", "train.save_every=100000", "train.keep=1", *options]
    process = trainer.start("run", *(word for o in options for word in ("--set", o)), start_new_session=True)
    _wait_for_steps(trainer, "run", process, 3)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"({number.name})" in out and "Traceback" not in out
    assert trainer.checkpoints("run") == [f"step-{trainer.losses('run')[-1][0]:08d}"]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_dead_launcher_saves(trainer, launcher):
    """A launcher that is killed passes no signal on, and deepspeed's outer one none at all; the ranks notice."""
    options = ["--set", "train.steps=100000", "--set", "train.save_every=100000"]
    process = trainer.start("run", *options, ranks=2, launcher=launcher)
    _wait_for_steps(trainer, "run", process, 3)
    process.kill()
    process.wait(timeout=60)
    deadline = time.time() + 60
    while not checkpoint.saved_steps(trainer.folder / "run"):
        assert time.time() < deadline, process.communicate()[0]
        time.sleep(0.2)


def _wait_for_steps(trainer, run: str, process, count: int) -> None:
    metrics = trainer.folder / run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]


def test_going_back_to_an_older_checkpoint(trainer):
    """What came after it is set aside, and the run takes the same way again."""
    trainer("run", *SAVE)
    whole = trainer.losses("run")
    out = trainer("run", *SAVE, "--resume", str(trainer.folder / "run/checkpoints/step-00000002"))
    assert out.count("a later checkpoint is now") == 2
    assert trainer.losses("run") == whole
    steps = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert trainer.checkpoints("run") == [f"aside-{step}" for step in steps[1:]] + steps


def _save(run_dir, step, **options):
    return checkpoint.save(
        run_dir, {"model/w": torch.full((3,), step)}, checkpoint.Info(step, 0, 42, {}, {}), **{"keep": 9, **options}
    )


def test_checkpoints_lie_in_order_of_steps(tmp_path):
    paths = [_save(tmp_path, step) for step in (8, 99_999_999, 100_000_000)]
    (tmp_path / "checkpoints/step-by-step").mkdir()
    assert checkpoint.saved_steps(tmp_path) == paths
    last = _save(tmp_path, 100_000_001, keep=2)
    assert checkpoint.saved_steps(tmp_path) == [paths[-1], last]


def test_half_deleted_checkpoint_is_no_checkpoint_and_no_obstacle(tmp_path):
    one, two = _save(tmp_path, 1), _save(tmp_path, 2)
    (two / checkpoint.STATE_FILE).unlink()
    assert checkpoint.find(tmp_path, "auto") == one
    assert _save(tmp_path, 2) == two
    assert checkpoint.open_state(two)("model/w").tolist() == [2, 2, 2]


def test_a_run_does_not_go_on_among_checkpoints_of_another(tmp_path):
    mine, other = _save(tmp_path / "mine", 1), _save(tmp_path / "other", 2)
    (tmp_path / "link").symlink_to(mine)
    assert checkpoint.find(tmp_path / "mine", str(tmp_path / "link")) == tmp_path / "link"
    assert checkpoint.find(tmp_path / "new", str(tmp_path / "other")) == other
    with pytest.raises(checkpoint.UserError, match="already holds checkpoints"):
        checkpoint.find(tmp_path / "mine", str(other))


def test_failed_save_keeps_the_last_good_one(tmp_path, monkeypatch):
    info = checkpoint.Info(1, 16, 42, {}, {})
    good = checkpoint.save(tmp_path, {"model/w": torch.ones(3)}, info, keep=1)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(checkpoint.UserError, match="No space left"):
        checkpoint.save(tmp_path, {"model/w": torch.zeros(3)}, checkpoint.Info(2, 32, 42, {}, {}), keep=1)
    assert checkpoint.saved_steps(tmp_path) == [good]
    assert os.listdir(tmp_path / "checkpoints") == [good.name]
    assert checkpoint.open_state(good)("model/w").tolist() == [1, 1, 1]


def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path):
    info, poison = checkpoint.Info(2, 32, 42, {}, {}), {"model/w": torch.tensor([1.0, torch.nan])}
    with pytest.raises(checkpoint.UserError, match=r"not written, since model/w is not finite"):
        checkpoint.save(tmp_path, poison, info, keep=1)
    assert checkpoint.saved_steps(tmp_path) == []
    path = checkpoint.save(tmp_path, {"model/w": torch.ones(2)}, info, keep=1)
    checkpoint.save_file(poison, path / checkpoint.STATE_FILE)
    with pytest.raises(checkpoint.UserError, match=r"model/w is not finite; remove the folder"):
        checkpoint.open_state(path)("model/w")
