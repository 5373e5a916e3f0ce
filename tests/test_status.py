"""A script can obtain the status of a run from the first line that `report` prints."""

import json
import subprocess
import sys

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.report import main
from m3ae_fast.pretraining.final_evaluation import stage
from m3ae_fast.process.failure_messages import explain, rank_lost
from m3ae_fast.process.how_to_resume import AGAIN, how_to_resume, resumed_by
from m3ae_fast.training import run_state
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.training.run_state import Recorder, status
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT


def recorded(folder, steps, error=None, reason=""):
    """Record a run of ten steps that ends after `steps` of them."""
    recorder = Recorder(folder, 10)
    with recorder.ending(lambda: steps, lambda: reason, explain):
        recorder.begin(0)
        if error:
            raise error


def test_report_prints_first_how_a_run_has_ended(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    recorded(tmp_path, 10)
    assert main([str(tmp_path)]) == 0
    recorded(tmp_path, 4, reason="SIGTERM")
    assert main([str(tmp_path)]) == 0
    with pytest.raises(UserError):
        recorded(tmp_path, 7, UserError("the loss of step 7\nis not finite"))
    assert main([str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1::2] == [f"wrote {page}"] * 3
    failed = "Failed at step 7 of 10 (the loss of step 7 is not finite)"
    for line, status_of_run in zip(
        lines[::2], ("Finished at step 10 of 10", "Stopped at step 4 of 10 (SIGTERM)", failed)
    ):
        assert line.startswith(f"{status_of_run}.")
    assert failed in page.read_text()


def test_the_status_of_a_failed_run_contains_its_error_line(tmp_path):
    """If a rank was killed, the status says that a rank was lost; gloo's message on the other ranks does not explain
    the failure."""
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError):
        recorded(tmp_path, 7, lost)
    expected = rank_lost("another rank")
    assert status(tmp_path)[1] == f"failed at step 7 of 10 ({expected})"


def test_a_killed_run_has_failed_after_the_last_step_that_it_logged(tmp_path):
    Recorder(tmp_path, 10).begin(2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    state, reason = status(tmp_path)
    assert state == "failed" and reason.startswith("failed: killed after step 5 of 10 was logged")


def test_the_status_shows_the_changed_number_of_steps(tmp_path):
    recorder = Recorder(tmp_path, 10)
    recorder.change(0, 20)
    assert not (tmp_path / "status.json").exists()  # nothing is recorded before the first step
    with recorder.ending(lambda: 20, str, explain):
        recorder.begin(0)
        recorder.change(5, 30)
        assert "step 5 of 30" in status(tmp_path)[1]
        recorder.change(6, 20)
    assert status(tmp_path)[1] == "finished at step 20 of 20"


def test_a_run_whose_folder_is_locked_is_reported_as_running_and_not_disturbed(tmp_path):
    Recorder(tmp_path, 10).begin(2)
    with RunFolder(tmp_path) as folder:
        (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
        command = [sys.executable, "-m", "m3ae_fast", "report", str(tmp_path)]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.startswith("Running, step 2 of 10 logged."), done.stderr
        assert folder.keep() == ""  # the run still has its lock


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_ends_or_begins_while_its_record_is_read_has_not_failed(tmp_path, monkeypatch, before):
    Recorder(tmp_path, 10).begin(2)
    held, read = [before], run_state.read_json
    monkeypatch.setattr(run_state, "is_held", lambda path: held[0])
    monkeypatch.setattr(run_state, "read_json", lambda path: held.insert(0, not before) or read(path))
    assert status(tmp_path) == ("running", "running, step 2 of 10 logged")


def test_nothing_is_recorded_before_a_step(tmp_path):
    with Recorder(tmp_path / "run", 10).ending(lambda: 0, str, explain):
        pass
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no run has taken a step in this folder"):
        status(tmp_path)
    for damaged in ('{"state": "finished"}', '{"state": "on fire", "step": 1, "total_steps": 2}'):
        (tmp_path / "status.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            status(tmp_path)


@pytest.mark.slow
def test_a_training_run_updates_its_status_record(trainer):
    trainer("run", "--set", "train.steps=2", "--set", "train.eval_samples=4")
    assert status(trainer.folder / "run") == ("finished", "finished at step 2 of 2")
    out = trainer("run", "--resume", "auto", "--set", "train.steps=4", "--set", "model.emb_dim=64", code=2)
    assert "was made with" in out and status(trainer.folder / "run")[0] == "finished"
    assert json.loads((trainer.folder / "run/status.json").read_text())["total_steps"] == 2


def test_messages_say_how_to_continue_a_run_of_the_present_program():
    def messages():
        return str(rank_lost("rank 1")), str(explain(RuntimeError("DataLoader worker (pid 1) is killed by signal")))

    with resumed_by("the same command"):
        assert all("the same command continues from the last checkpoint" in each for each in messages())
    with resumed_by(AGAIN, "starts over"):
        assert all("running the same command again starts over" in each for each in messages())
        assert not any("checkpoint" in each for each in messages())
    assert all("--resume auto continues from the last checkpoint" in each for each in messages())


def test_the_stages_of_pretrain_are_resumed_by_the_same_command():
    with stage("cpu"):
        assert how_to_resume() == "the same command"
