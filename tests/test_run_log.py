"""The files of a run in addition to its checkpoints."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import BadSamples, Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import METRICS_FILE
from m3ae_fast.checkpoint import state_files, writing
from m3ae_fast.config import Config, parse
from m3ae_fast.data import open_data
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.training import run_lock, throughput
from m3ae_fast.training.loggers import WANDB_ID_FILE
from m3ae_fast.training.metrics_line import MetricsLine
from m3ae_fast.training.metrics_log import RunLog
from m3ae_fast.training.run_lock import LOCK_FILE, RunFolder
from m3ae_fast.training.trainer import Trainer
from tests.helpers.checkpoints import save
from tests.helpers.labelled import tiny_run
from tests.helpers.pretraining_task import task_without_engine


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_resumed_run_truncates_its_log_and_a_new_run_clears_it(tmp_path, capfd):
    with RunLog(tmp_path, 0, 9) as metrics:
        for step in range(4):
            metrics.log(step, {"loss": 1.0})
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n5\n{"step": "x"}\n{"step": null}\n')  # lines from another program
        file.write(b'{"step": 4, "lo')  # killed while writing
    with RunLog(tmp_path, 2, 9) as metrics:
        metrics.log(3, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    with RunLog(tmp_path, 0, 9) as metrics:
        metrics.log(0, {"val_loss": 3.0}, {"val_loss": "gpu07"})
    assert lines(tmp_path) == [{"step": 0, "val_loss": 3.0}]
    assert "val_loss 3 (on gpu07)" in capfd.readouterr().out


def test_the_remaining_time_is_logged_with_the_losses_of_a_step(tmp_path, capfd):
    with RunLog(tmp_path, 2, 12, loggers=()) as metrics:
        metrics.log(2, {"val_loss": 1.0})
        metrics.begin()
        for step, left in ((3, 540.0), (4, 79.7)):
            metrics.advance(step, left)
            metrics.log(step, {"loss": 1.0})
    before, *lines = capfd.readouterr().out.splitlines()
    assert "eta" not in before
    assert [line.partition("eta ")[2] for line in lines] == ["0:09:00", "0:01:20"]


def test_a_run_folder_cannot_be_used_by_two_runs(tmp_path):
    program = "import pathlib, sys; from m3ae_fast.training.run_lock import RunFolder\n"
    program += "folder = RunFolder(pathlib.Path(sys.argv[1])); print('has it', flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match="another run is using this folder"):
            RunFolder(tmp_path)
        other.kill()
    with RunFolder(tmp_path) as folder:
        (tmp_path / LOCK_FILE).unlink()  # removed by hand
        folder.keep()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
            assert "another run is using this folder" in other.stderr.read()


def test_a_file_is_locked_if_the_file_system_cannot_lock_folders(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", missing)
    with RunFolder(tmp_path / "run") as folder:
        other = os.fork()
        if other == 0:
            os._exit(int(run_lock.is_held(folder.path)))
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 1


def test_asking_whether_the_own_run_folder_is_locked_does_not_release_the_lock(tmp_path):
    """A process loses its POSIX lock on a file when it closes another descriptor of the file."""
    with RunFolder(tmp_path) as folder:
        assert not run_lock.is_held(folder.path)
        other = os.fork()
        if other == 0:
            os._exit(int(run_lock.is_held(folder.path)))
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 1


def test_a_folder_to_which_nothing_was_written_is_left_as_it_was(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/a.txt").touch()
    for name in ("used", "new/run"):
        with RunFolder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "used"]


def test_the_lock_persists_after_its_file_is_removed(tmp_path):
    program = (
        "import pathlib, sys; from m3ae_fast.training.run_lock import RunFolder; RunFolder(pathlib.Path(sys.argv[1]))"
    )
    with RunFolder(tmp_path / "run") as folder:
        (folder.path / LOCK_FILE).unlink()
        second = subprocess.run([sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True)
        assert "another run is using this folder" in second.stderr
        assert folder.keep() and not folder.keep()
        # Like a loader worker, this process may outlive the run by a few seconds. It must not keep the folder locked.
        worker = os.fork()
        if worker == 0:
            signal.pause()
    RunFolder(tmp_path / "run").__exit__()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def test_a_folder_that_vanishes_does_not_replace_the_error_that_ends_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run") as folder:
        shutil.rmtree(folder.path)
        _ = 1 / 0


def test_a_run_folder_removed_during_training_is_reported_and_recreated(tmp_path, capsys):
    with RunFolder(tmp_path / "run") as folder, RunLog(folder.path, 0, 9) as metrics:
        metrics.log(1, {"loss": 1.0})
        while folder.path.exists():  # repeated, because TensorBoard's thread may write another file meanwhile
            shutil.rmtree(folder.path, ignore_errors=True)
        for step in (2, 3):
            metrics.log(step, {"loss": 1.0})
        assert folder.keep()
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3]
    captured = capsys.readouterr()
    assert captured.out.count("was deleted during the run") == 1 and "Traceback" not in captured.err


@pytest.mark.slow
def test_a_run_folder_renamed_during_training_is_reported_with_a_suggested_fix(trainer):
    run, renamed = trainer.folder / "run", trainer.folder / "renamed"
    process = trainer.fork("run", "--set", "train.steps=100000", "--set", "train.save_every=20")
    while process.is_alive() and not checkpoint.saved_steps(run):
        time.sleep(0.01)
    run.rename(renamed)
    while process.is_alive() and not checkpoint.saved_steps(run):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    note = f"run.dir {run} was renamed to {renamed}: metrics are still written there, but checkpoints are "
    assert process.exitcode == 0 and trainer.log("run").read_text().count(note) == 1
    for path in checkpoint.saved_steps(run):  # as the message suggests
        path.rename(renamed / "checkpoints" / path.name)
    last = checkpoint.step_of(checkpoint.saved_steps(renamed)[-1])
    trainer("renamed", "--set", f"train.steps={last + 1}", "--resume", "auto")
    assert trainer.lines("renamed")[-1][0] == last + 1


@pytest.mark.parametrize(
    "module, step", [(state_files, "save_file"), (state_files, "sha256"), (writing, "put_in_place")]
)
def test_renaming_the_run_folder_during_a_save_loses_no_data(tmp_path, monkeypatch, module, step):
    run, done = tmp_path / "run", getattr(module, step)

    def rename_first(*args):
        if not (tmp_path / "renamed").exists():
            run.rename(tmp_path / "renamed")
        return done(*args)

    monkeypatch.setattr(module, step, rename_first)
    saved = save(run, {"model/a": torch.zeros(2)}, checkpoint.Info(1, 16, 0, {}, {}), keep=1)
    assert checkpoint.saved_steps(run) == [saved]


def test_a_deleted_folder_or_lock_is_reported_once(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        shutil.rmtree(folder.path)
        assert "its contents were deleted during the run" in folder.keep() and not folder.keep()
        (folder.path / LOCK_FILE).unlink()
        assert "its .lock was deleted" in folder.keep() and not folder.keep()


def test_a_run_folder_that_stays_empty_is_removed(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with RunFolder(tmp_path / "run") as folder:
        (folder.path / METRICS_FILE).touch()
    assert (tmp_path / "run" / METRICS_FILE).exists()
    (tmp_path / "mine").mkdir()  # an empty folder of the user
    with RunFolder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["head -1", "true", "cat > /dev/full"])
def test_a_run_continues_if_the_reader_of_its_output_exits(tmp_path, reader):
    program = "import pathlib, sys; from m3ae_fast.training.metrics_log import RunLog\n"
    program += "with RunLog(pathlib.Path(sys.argv[1]), 0, 1) as metrics:\n"
    program += "    for step in range(3000): metrics.log(step, {'loss': 1.0})\n"
    program += "(pathlib.Path(sys.argv[1]) / 'done').touch()"
    subprocess.run(["sh", "-c", f'"$0" -c "$1" "$2" | {reader}', sys.executable, program, str(tmp_path)])
    assert (tmp_path / "done").exists() and len(lines(tmp_path)) == 3000


def test_a_full_disk_is_reported_once_and_the_run_continues(tmp_path, capsys):
    with RunLog(tmp_path, 0, 9) as metrics, open("/dev/full", "wb", buffering=0) as full:
        metrics.begin()
        written, metrics._file = metrics._file, full
        for step in (1, 2):
            metrics.log(step, {"loss": 1.0})
        metrics._file = written
    out = capsys.readouterr().out
    assert out.count("metrics can no longer be written (No space left on device)") == 1
    assert "step 2  loss 1" in out


@pytest.mark.parametrize("name", ["[/red]", ":smile:", "[bold]"])
def test_messages_are_printed_without_interpreting_markup(tmp_path, capsys, name):
    with RunLog(tmp_path / name, 0, 9) as metrics:
        metrics.print(f"saved {tmp_path / name}")
    assert f"/{name}\n" in capsys.readouterr().out


def test_tensorboard_contains_scalars_and_figures(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    with RunLog(tmp_path, 0, 9) as log:
        log.log(3, {"loss": 1.5})
        log.figure(3, "reconstructions", tmp_path / "a.png")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("loss")
    assert (point.step, point.value) == (3, 1.5)
    (picture,) = events.Images("reconstructions")
    assert (picture.step, picture.width, picture.height) == (3, 8, 6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pairs", "four channels", "texts"])
def test_loggers_receive_the_figures_of_the_report(tmp_path, monkeypatch, case):
    """The loggers receive the figures with every checkpoint. A stand-in for wandb records its arguments."""
    shown = []
    errors = SimpleNamespace(Error=RuntimeError)
    started = SimpleNamespace(id="a", define_metric=lambda *_, **__: None, log=shown.append, finish=lambda: None)
    stand_in = {"init": lambda **_: started, "Image": Path, "Settings": lambda **_: None, "errors": errors}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**stand_in))
    grey = {"channels": 4, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    model = grey if case == "four channels" else {}
    path = checkpoint.saved_steps(tiny_run(tmp_path, **model))[-1]
    settings = checkpoint.read_info(path).config
    settings["train"]["pictures"], settings["run"]["dir"] = 2, str(tmp_path)
    settings["data"]["val"][0]["modality"] = "text" if case == "texts" else "paired"
    config = parse(Config, settings, "run")
    names = ["reconstructions"] if case == "texts" else ["attention", "reconstructions"]
    data = open_data(config.data, config.model)
    with RunLog(tmp_path, 0, 9, ["tensorboard", "wandb"]) as log:
        log.log(3, {"loss": 1.5})
        task_without_engine(config, data).after_save(log, 3, path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == names and {events.Images(name)[0].step for name in names} == {3}
    pictures = {name: value for each in shown for name, value in each.items() if isinstance(value, Path)}
    assert pictures == {name: tmp_path / f"{name}.png" for name in names}
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"<summary>{name.capitalize()}</summary>" in page for name in names)


def test_tensorboard_keeps_events_before_the_resumed_step_and_purges_later_ones(tmp_path):
    for start, last, value in ((0, 4, 1.0), (2, 3, 2.0)):
        with RunLog(tmp_path, start, 9) as log:
            for step in range(start + 1, last + 1):
                log.log(step, {"loss": value})
        (written,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*.*")
        # the files are read in the order of the seconds in their names
        written.rename(tmp_path / f"tensorboard/events.out.tfevents.{start}")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.slow
def test_wandb_logs_offline_and_continues_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    ids = []
    for start in (0, 3, 0):
        with RunLog(tmp_path, start, 9, ["wandb"], {"train": {"steps": 9}}) as log:
            log.log(start + 3, {"loss": 1.5})
            log.figure(start + 3, "reconstructions", tmp_path / "a.png")
        ids.append((tmp_path / WANDB_ID_FILE).read_text())
    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 3


@pytest.mark.slow
def test_wandb_without_an_account_is_reported_in_one_line(tmp_path):
    program = "import pathlib, sys; from m3ae_fast.training.metrics_log import RunLog\n"
    program += "from m3ae_fast.base.errors import exit_cleanly\n"
    program += "log = RunLog(pathlib.Path(sys.argv[1]), 0, 1, ['wandb']); sys.exit(exit_cleanly(log.begin))"
    account = ("WANDB_API_KEY", "WANDB_MODE", "HOME", "NETRC")
    env = {k: v for k, v in os.environ.items() if k not in account} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "WANDB_MODE=offline" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: run.loggers: wandb:"), done.stderr


def test_the_log_line_names_the_nodes_with_the_longest_data_wait_and_computation():
    """The ranks exchange these times in one sum, in which each rank has entries for its waiting time and its forward
    passes."""
    for hosts, own, wait, where in (
        (["a", "c", "b"], 0.2, 0.4, {"data_wait": "b", "forward_s": "c"}),
        (["a", "c", "b"], 0.5, 0.5, {"data_wait": "a", "forward_s": "a"}),
        (["a"] * 3, 0.2, 0.4, {}),
    ):
        ranks = SimpleNamespace(rank=0, world=3, hosts=hosts, device=torch.device("cpu"))
        ranks.sum = lambda values: [values[0] * 3, *(a + b for a, b in zip(values[1:], (0, 0.1, 0.4, 0, 0.3, 0.1)))]
        line = MetricsLine(
            ranks=ranks,
            throughput=SimpleNamespace(rates=lambda own=own: {"data_wait": own}),
            forward=SimpleNamespace(per_step=lambda steps, own=own: own * 2 / steps),
            not_computed=(),
            logged=59,
        )
        values, named = line.after(61, [PackedLosses(torch.tensor(2.0))], torch.tensor(1.0), 0.1, 6.1, 4)
        assert (values["loss"], values["data_wait"], values["forward_s"], named) == (2.0, wait, max(own, 0.3), where)
        assert (values["lr"], values["epoch"], values["skipped"], line.logged) == (0.1, 6.1, 4, 61)


def test_a_log_line_contains_the_learning_rate_of_its_step_and_growing_memory_is_reported():
    """The growth of the memory is measured from the first step of this attempt."""
    logged, looked = [], []
    trainer = SimpleNamespace(
        step=61,
        start=11,
        schedule=SimpleNamespace(lr=lambda step: step / 10, steps_per_epoch=10, due=lambda *_: True),
        config=SimpleNamespace(train=SimpleNamespace(log_every=1)),
        bad=SimpleNamespace(bad=0),
        line=SimpleNamespace(after=lambda *values: ({"peak_memory_gb": 3.0, "values": values}, {})),
        growth=SimpleNamespace(check=lambda steps, memory: looked.append((steps, memory)) or "it grows"),
        log=SimpleNamespace(log=lambda *line: logged.append(line), print=logged.append),
    )
    Trainer.log_step(trainer, ["losses"], "norm")
    (step, values, _), note = logged
    assert step == 61 and values["values"] == (61, ["losses"], "norm", 6.0, 6.1, 0)
    assert looked == [(50, 3.0)] and note == "note: it grows"


def test_forward_passes_of_training_are_timed(monkeypatch):
    clock, module = [0.0], torch.nn.Identity()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    timer = throughput.ForwardTime(module, torch.device("cpu"))

    def step(seconds):
        monkeypatch.setattr(module, "forward", lambda: clock.__setitem__(0, clock[0] + seconds))
        module()
        clock[0] += 100  # backward pass and other work

    step(1.0), step(2.0)
    module.eval()
    step(50.0)
    assert timer.per_step(2) == 1.5
    module.train()
    step(4.0)
    assert timer.per_step(1) == 4.0


def test_bad_samples_of_all_ranks_are_named_once_by_rank_0(caplog):
    found = [[Skipped("a.tar", str(number), "no caption") for number in range(count)] for count in (3, 0, 30)]
    for rank, named in ((0, 21), (1, 0)):
        caplog.clear()
        ranks = SimpleNamespace(is_main=rank == 0, gather=lambda own: [each[:20] for each in found])
        loop = SimpleNamespace(ranks=ranks, bad=BadSamples(0.5, 1000))
        Trainer._name_bad(loop, found[rank])
        assert not loop.bad.names_more and len(caplog.messages) == named
        with pytest.raises(UserError, match=r"for example a\.tar/19: no caption"):
            loop.bad.count(100, 51)


class PackedLosses(NamedTuple):
    loss: torch.Tensor
