"""One command trains, evaluates and exports a model from images."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from m3ae_fast import checkpoint, pretrain
from m3ae_fast import shards as shard_commands
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.hardware import fast_precision
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.cli import convert, draw
from m3ae_fast.cli.pretrain import main
from m3ae_fast.config import Config, KnnProbeConfig, load_config, parse
from m3ae_fast.data.manifest import rows_of
from m3ae_fast.data.manifest import write as write_manifest
from m3ae_fast.engine.memory_estimate import memory_needed
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation.baseline_results import UNTRAINED
from m3ae_fast.pretraining import automatic_settings, final_evaluation, size_and_length, source_shards, stages
from m3ae_fast.pretraining import dataset_statistics as look_module
from m3ae_fast.pretraining.automatic_settings import (
    DatasetStatistics,
    Inputs,
    Shards,
    batch_of,
    image_and_patch,
    settings,
    steps_in,
)
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES
from m3ae_fast.pretraining.source_shards import overlap
from m3ae_fast.process.stoppable_loop import Stopped
from m3ae_fast.shards.duplicate_images import PIECE
from m3ae_fast.shards.held_out import shared_images, write_without
from m3ae_fast.shards.sources.columns import NO_CAPTIONS
from m3ae_fast.train import main as start
from m3ae_fast.training import device_clock, throughput_estimate
from m3ae_fast.training.run_lock import LOCK_FILE
from m3ae_fast.training.run_state import status
from m3ae_fast.training.throughput_estimate import StepTime, ThroughputEstimate
from tests.helpers.checkpoints import save
from tests.helpers.labelled import tiny_run
from tests.helpers.ranks import environment
from tests.helpers.shards import members, picture, write_tar
from tests.helpers.source_shards import find_shards
from tests.helpers.trainer import SHORT, TINY

COLOURS = {"blue": (40, 40, 200), "green": (40, 180, 40), "red": (200, 40, 40)}


def make_pictures(folder, each=20, captions=True):
    """Write noisy images with captions to one folder per colour."""
    random = np.random.RandomState(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(np.array(colour) + random.randint(-40, 40, (40, 48, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
            if captions:
                (folder / name / f"{i}.txt").write_text(f"a {name} picture number {i}")
    return folder


STOPS = """
import gc, os, signal, sys, time
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.pretraining import dataset_statistics, size_and_length, stages
from m3ae_fast.cli.pretrain import main
from m3ae_fast.training.pretraining_task import PretrainingTask
from m3ae_fast.training.trainer import Trainer
from m3ae_fast.shards import writer
from m3ae_fast.evaluation import knn
from m3ae_fast.heads import logistic_regression

STAGES = {
    "shards": (writer, "_write"), "tokenizer": (dataset_statistics, "train_tokenizer"),
    "statistics": (dataset_statistics, "collect"),
    "measuring": (size_and_length, "measure"),
    "training": (Trainer, "log_step"), "end of training": (PretrainingTask, "conclude"),
    "k-NN": (knn, "run"), "logistic regression": (logistic_regression, "fit_chosen"),
    "report": (stages, "write_report"), "export": (stages, "convert"),
}
HEEDED = ("training", "end of training")  # stages in which the program itself handles the signal

def stop_in(stage):
    place, name = STAGES[stage]
    before = getattr(place, name)

    def stopped(*args, **options):
        os.killpg(0, signal.SIGINT)  # as a terminal does
        if stage in HEEDED:
            return before(*args, **options)
        time.sleep(60)

    setattr(place, name, stopped)

for stage in [*STAGES, None]:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        gc.unfreeze()  # the child acts as a separate program, so objects that remain at its exit must be collected
        os.dup2(1, 2)
        print("---", stage, flush=True)
        if stage:
            stop_in(stage)
        sys.exit(exit_cleanly(lambda: main(sys.argv[1:])))
    print("\\n=== code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_finished_run_is_evaluated_with_the_current_settings(tmp_path, monkeypatch, capsys):
    shards, run, seen = write_tar(tmp_path / "a.tar", members(range(3), "image")), tmp_path / "run", []
    statistics = DatasetStatistics(3, 3, 32, [0.5] * 3, [0.2] * 3, classes=2, vocab_size=0, text_length=8)
    run.mkdir()
    config = settings(Inputs(statistics, Shards([shards], [shards], []), run), MODEL_SIZES[0], 1, 9)
    (run / "config.json").write_text(config.model_dump_json())
    trained = []
    monkeypatch.setattr(stages, "pre_train", lambda *_, **options: trained.append(options) or 0.0)
    monkeypatch.setattr(stages, "status", lambda _: ("finished", ""))
    monkeypatch.setattr(stages, "unused_gpus", lambda world, device: 3)
    # this function replaces `evaluate_run` and returns None, as `evaluate_run` does if the user stops it
    monkeypatch.setattr(stages, "evaluate_run", lambda *args: seen.append(args))
    overrides = ["train.probe.k=7", 'optim={"clip_grad": 2}']  # the other settings of the section are kept
    assert not pretrain(shards, run, val=[shards], overrides=overrides, device="cpu").finished
    train = config.train.model_copy(update={"probe": config.train.probe.model_copy(update={"k": 7})})
    changed = {"train": train, "optim": config.optim.model_copy(update={"clip_grad": 2.0})}
    assert seen == [(config.model_copy(update=changed), "cpu")]
    assert trained[0].pop("folder").path == run
    assert trained == [{"resume": "auto", "make_probe": stages.knn_probe}]
    out = capsys.readouterr().out
    assert "note: unused GPUs of this machine: 3; pretrain runs as a single process" in out
    assert "config.json already exists: its settings are kept" in out
    assert "\nto train longer, increase the total number of steps, now 9: --set train.steps=N; do this before" in out
    other = write_tar(tmp_path / "b.tar", members(range(3), "image"))
    with pytest.raises(UserError, match=r"b\.tar: the run in .* has another SOURCE"):
        pretrain(other, run, val=[shards], device="cpu")


@pytest.mark.slow
def test_a_copied_run_folder_resumes_in_its_new_location(tmp_path, monkeypatch):
    """The config in the copied folder still contains the path of the original folder."""
    photos = make_pictures(tmp_path / "photos", each=2, captions=False)
    overrides = ["data.workers=0", "train.steps=1", "train.probe=null", "train.pictures=0"]
    monkeypatch.chdir(tmp_path)
    assert pretrain(photos, "run", hours=0.001, overrides=overrides).finished
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    last = checkpoint.locate(tmp_path / "run")
    copied = shutil.copytree(tmp_path / "run", tmp_path / "below/copied")
    assert pretrain(photos, "copied", overrides=["train.steps=2"]).finished
    assert load_config("copied/config.json").run.dir == copied
    assert checkpoint.locate(copied).name == "step-00000002" and os.listdir(tmp_path / "below") == ["copied"]
    assert checkpoint.locate(tmp_path / "run") == last


@pytest.mark.slow
def test_a_moved_run_folder_remains_complete(tmp_path, monkeypatch, capsys):
    """After the move, there is a new folder at the old path, whose files must not be used. The moved folder is given by
    relative paths from several working directories."""
    photos = make_pictures(tmp_path / "photos", each=2)
    overrides = ["data.workers=0", "train.steps=1", "train.probe=null", "train.pictures=0"]
    monkeypatch.chdir(tmp_path)
    assert pretrain(photos, "run", hours=0.001, overrides=overrides).finished
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run/shards").mkdir(parents=True)
    assert draw.main(["reconstructions", "moved", "--out", "drawn.png"]) == 0
    monkeypatch.chdir(tmp_path / "moved")
    assert convert.main(["../moved", "--out", "out"]) == 0
    assert "left out" not in capsys.readouterr().out and Path("out/tokenizer.json").exists()
    assert pretrain(photos, ".", overrides=["train.steps=2"]).finished
    assert checkpoint.locate(Path()).name == "step-00000002" and os.listdir(tmp_path / "run") == ["shards"]
    config = load_config("config.json")
    assert config.run.dir == tmp_path / "moved" == Path(config.data.tokenizer).parent
    monkeypatch.chdir("/")
    assert start(["--config", str(tmp_path / "moved/config.json"), "--set", "train.steps=3", "--resume", "auto"]) == 0
    assert checkpoint.locate(tmp_path / "moved").name == "step-00000003"


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_second_call_is_refused_at_once_in_every_stage_of_the_first(tmp_path, monkeypatch, dry_run):
    """The refused call writes nothing. A call that is killed does not block the next one."""
    photos, run = make_pictures(tmp_path / "photos", each=2, captions=False), tmp_path / "run"
    program = (
        "import sys; from m3ae_fast.pretraining import stages; from m3ae_fast import pretrain\n"
        "def hold(*_, **options): print(flush=True); input()\n"
        "stages.find_shards = hold; pretrain(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(photos), str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as first:
        first.stdout.readline()
        with pytest.raises(UserError, match="run: another run is using this folder; choose another one"):
            pretrain(photos, run, dry_run=dry_run)
        assert os.listdir(run) == [LOCK_FILE]
        first.kill()
    monkeypatch.setattr(stages, "choose", lambda *_: None)  # `choose` returns None if the user stops it
    assert not pretrain(photos, run, dry_run=dry_run).finished and (run / "shards").is_dir()


def test_results_are_computed_from_the_last_checkpoint(tmp_path, monkeypatch):
    run, measured = tiny_run(tmp_path / "run"), []

    def evaluate(task, model, *, out, **options):
        measured.append(task)
        final_evaluation.write_text_atomically(out / "result.json", json.dumps(result(len(measured))))

    def result(number):
        return {"top1": number, "top1_se": 0, "val_samples": 2}

    monkeypatch.setattr(final_evaluation, "evaluate", evaluate)
    shards = [{"shards": "a.tar"}]
    given = {"data": {"train": shards}, "train": {"steps": 9, "probe": {"train": shards, "val": shards}}}
    config = Config.model_validate({"run": {"dir": str(run)}, **given}, strict=False)
    first = final_evaluation.evaluate_run(config)
    assert final_evaluation.evaluate_run(config) == first and measured == ["knn", "logistic"]
    (run / "results/logistic/old").touch()
    info = checkpoint.read_info(checkpoint.locate(run))
    save(run, {"model/a": torch.zeros(1)}, replace(info, step=2))
    assert final_evaluation.evaluate_run(config)["logistic"][final_evaluation.RUN] == result(4)
    assert not (run / "results/logistic/old").exists()
    for text in ("", "[]", "{}", '{"top1": "x"}'):
        (run / "results/knn/result.json").write_text(text)
        with pytest.raises(UserError, match=r"result.json: is damaged \(.*\); remove .*/knn to repeat the evaluation"):
            final_evaluation.evaluate_run(config)
    (run / "results").rename(tmp_path / "elsewhere")
    (run / "results").symlink_to(tmp_path / "elsewhere")
    save(run, {"model/a": torch.zeros(1)}, replace(info, step=3))
    with pytest.raises(UserError, match="results: cannot be replaced"):
        final_evaluation.evaluate_run(config)


def test_the_run_and_its_initial_weights_are_evaluated_on_the_samples_of_the_probe(tmp_path, monkeypatch):
    run, start, given, features = tiny_run(tmp_path / "run"), tmp_path / "start", [], []
    start.mkdir()

    def evaluate(task, model, *, out, session, shared, **options):
        given.append((task, model, options))
        features.append(shared)
        result = {"top1": 0.5, "top1_se": 0, "val_samples": 2}
        final_evaluation.write_text_atomically(out / "result.json", json.dumps(result))

    monkeypatch.setattr(final_evaluation, "evaluate", evaluate)
    probe = {"train": [{"shards": ["a.tar", "b.tar"]}], "val": [{"shards": "c.tar"}], "labels": "json.kind"}
    sections = {"run": {"dir": str(run)}, "model": {"init_from": str(start)}, "data": {"train": probe["train"]}}
    final_evaluation.evaluate_run(
        Config.model_validate(sections | {"train": {"steps": 9, "probe": probe}}, strict=False)
    )
    options = {"train": ["a.tar", "b.tar"], "val": ["c.tar"], "labels": "json.kind"}
    assert given == [
        (task, str(model), options | {"baselines": model == run})
        for model in (run, start)
        for task in ("knn", "logistic")
    ]
    assert [each is features[0] for each in features] == [True, True, False, False] and features[2] is features[3]


def test_the_table_of_accuracies_is_aligned_by_task_and_model():
    def results(*tops, chance):
        run, untrained, pixels, start = ({"top1": top1, "top1_se": 0.015} for top1 in tops)
        run |= {"baselines": {UNTRAINED: untrained, "downscaled pixels": pixels}, "chance": chance, "val_samples": 1200}
        return {final_evaluation.RUN: run, final_evaluation.STARTED: start}

    found = {"knn": results(0.75, 0.5, 0.625, 0.7, chance=0.66), "logistic": results(0.7, 0.4, 0.6, 0.5, chance=0.66)}
    head, *lines, largest = final_evaluation.table(found)
    ends = [head.index(title) + len(title) for title in ("k-NN", "logistic regression")]
    for line, name, *texts in zip(
        lines,
        (final_evaluation.RUN, UNTRAINED, "downscaled pixels", final_evaluation.STARTED),
        ("75.0 ± 1.5", "50.0 ± 1.5", "62.5 ± 1.5", "70.0 ± 1.5"),
        ("70.0 ± 1.5", "40.0 ± 1.5", "60.0 ± 1.5", "50.0 ± 1.5"),
    ):
        assert line.startswith(f"{name} ") and [line.index(text) + len(text) for text in texts] == ends
    assert largest.split() == ["the", "largest", "class", "66.0", "66.0", "(1,200", "samples)"]


@pytest.mark.slow
def test_the_same_command_resumes_a_run_stopped_in_any_stage(tmp_path):
    """A terminal sends Ctrl-C to all processes of a job. The command reports it in one line, and repeats no stage."""
    make_pictures(tmp_path / "photos", each=6)
    settings = (
        "data.workers=1",
        "train.steps=3",
        "train.eval_every=null",
        "train.probe.every=null",
        "train.pictures=0",
    )
    line = ["photos", "--out", "run", "--hours", "0.001", *(option for each in settings for option in ("--set", each))]
    done = subprocess.run(
        [sys.executable, "-c", STOPS, *line], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *stopped, whole = re.findall(r"--- (.+)\n([\s\S]*?)\n=== code (\d+)\n", done.stdout)
    assert len(stopped) == 10
    for stage, output, code in stopped:
        assert (
            output.splitlines()[-1].endswith("; run the same command again to resume") and "Traceback" not in output
        ), output
        interrupted = stage in ("shards", "report", "export")
        assert code == ("130" if interrupted else "0"), (stage, output)
    assert "stopped at step 1 (SIGINT); the same command continues" in stopped[4][1]
    assert (
        whole[2] == "0"
        and "this run" in whole[1]
        # "step 3" occurs only in the summary, because the run is not trained again
        and not re.search("step 3(?! of 3)", whole[1])
        and (tmp_path / "run/export").is_dir()
    )
    outputs = [output for _, output, _ in [*stopped, whole]]
    for once in (
        "tokens (vocabulary",
        "saved run/checkpoints/step-00000003",
        "knn: random weights: top1",
        "logistic: top1",
    ):
        assert sum(once in output for output in outputs) == 1, once


KILLED = """
import os, signal, sys
from m3ae_fast.cli.pretrain import main
from m3ae_fast.training.pretraining_task import PretrainingTask

PretrainingTask.after_save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_checkpoint_is_finished_by_the_next_call(tmp_path, capsys):
    photos, run = make_pictures(tmp_path / "photos", each=6), tmp_path / "run"
    overrides = [*SHORT, "data.workers=0", "train.eval_every=null", "train.probe.every=null"]
    line = [photos, "--out", run, "--hours", "0.001", *(option for each in overrides for option in ("--set", each))]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, line)], env=environment(), capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.locate(run).name == "step-00000002" and status(run)[0] == "failed"
    trained = shutil.copytree(run, tmp_path / "trained")
    assert start(["--config", str(trained / "config.json"), "--set", f"run.dir={trained}", "--resume", "auto"]) == 0
    assert status(trained) == ("finished", "finished at step 2 of 2")
    capsys.readouterr()
    outcome = pretrain(photos, run, overrides=["data.workers=0"])
    printed = capsys.readouterr().out
    assert "training is complete" in printed
    assert outcome.finished and outcome.report.is_file() and outcome.export.is_dir() and outcome.results
    told = "2 steps are too few to judge what the model learns"
    assert (
        f"warning: too few steps: {told}" in printed and f"<b>too few steps</b>: {told}" in outcome.report.read_text()
    )
    assert printed.count("Finished at step 2 of 2. The image loss on held-out samples is") == 1
    assert status(run) == ("finished", "finished at step 2 of 2") and (run / "reconstructions.png").is_file()
    drawn = (run / "reconstructions.png").stat().st_mtime_ns
    assert pretrain(photos, run, overrides=["data.workers=0"]).finished
    assert (run / "reconstructions.png").stat().st_mtime_ns == drawn


def test_a_run_refuses_a_source_whose_images_have_changed(tmp_path):
    photos = make_pictures(tmp_path / "photos", each=4)
    overrides = ["data.workers=0", "train.steps=2", "train.probe=null", "train.pictures=0"]
    outcome = pretrain(photos, tmp_path / "run", hours=0.001, overrides=overrides)
    assert outcome.finished and outcome.report.is_file() and outcome.results == {}
    copied = shutil.copytree(photos, tmp_path / "copied", copy_function=shutil.copyfile)
    os.utime(copied / "red/0.png", ns=(0, 0))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/shards").glob("*.tar")}
    assert pretrain(copied, tmp_path / "run", overrides=["train.steps=3"]).finished  # only the times have changed
    assert checkpoint.locate(tmp_path / "run").name == "step-00000003"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/shards").iterdir() if path in before}
    (photos / "red/0.txt").write_text("a red picture number 9")  # as many characters as before
    with pytest.raises(UserError, match=r"has changed since the run in .* began; choose another --out"):
        pretrain(photos, tmp_path / "run")
    shutil.rmtree(photos)
    copied.rename(photos)
    Image.new("RGB", (40, 40)).save(photos / "red/7.png")
    with pytest.raises(UserError, match=r"has changed since the run in .* began; choose another --out"):
        pretrain(photos, tmp_path / "run")


def test_images_with_more_than_8_bits_require_a_value_range(tmp_path, capsys):
    deep = np.random.RandomState(0).randint(0, 4096, (4, 40, 40)).astype(np.uint16)
    (tmp_path / "photos").mkdir()
    for number, values in enumerate(deep):
        Image.fromarray(values).save(tmp_path / f"photos/{number}.png")
    message = (
        r"the images have unsigned 16-bit values, which range from \d+ to 409\d in 4 inspected images: set the values "
        r"of black and white, for example --set model.value_range=\[0,4095\]; model.value_range=dtype sets 0 and 65535"
    )
    with pytest.raises(UserError, match=message):
        pretrain(tmp_path / "photos", tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run/shards").exists()
    pretrain(tmp_path / "photos", tmp_path / "run", hours=0.001, overrides=["model.value_range=[0,4095]"], dry_run=True)
    assert "data: 3 samples and 1 held out" in capsys.readouterr().out


def test_shards_of_changed_images_are_rewritten_before_a_run_starts(tmp_path):
    photos = make_pictures(tmp_path / "photos", each=4)
    out = tmp_path / "run"
    find_shards(str(photos), out, None, [])
    (out / "config.json").write_text("{}")
    first = (out / "shards/train-00000.tar").stat().st_mtime_ns
    assert not find_shards(str(photos), out, None, []).notes
    assert (out / "shards/train-00000.tar").stat().st_mtime_ns == first and (out / "config.json").exists()
    (photos / "red/0.txt").write_text("another caption")
    assert "the shards are created again" in find_shards(str(photos), out, None, []).notes[-1]
    assert (out / "shards/train-00000.tar").stat().st_mtime_ns != first and not (out / "config.json").exists()
    (photos / "red/0.txt").write_text("a third one")
    # there is no config.json, as after a dry run
    assert "the shards are created again" in find_shards(str(photos), out, None, []).notes[-1]
    shutil.rmtree(out / "shards")
    shard_commands.make(photos, out / "shards")
    with pytest.raises(UserError, match="contains shards that pretrain has not made; choose another --out"):
        find_shards(str(photos), out, None, [])


def test_settings_are_chosen_again_if_the_images_change_before_a_run_starts(tmp_path, monkeypatch, capsys):
    def plan(inputs, *_):
        config = settings(inputs, MODEL_SIZES[0], 4, 9)
        return size_and_length.Plan(config, [f"{inputs.statistics.samples} training samples"])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "choose", plan)
    monkeypatch.setattr(stages, "pre_train", interrupted)
    photos = make_pictures(tmp_path / "photos", each=4, captions=False)
    for expected in ("11 training samples", "its settings are kept", "12 training samples"):
        with pytest.raises(KeyboardInterrupt):
            pretrain(photos, tmp_path / "run")
        printed = capsys.readouterr().out
        assert expected in printed and (tmp_path / "run/config.json").exists()
        if "kept" in expected:
            Image.new("RGB", (40, 40)).save(photos / "red/black.png")
    assert "has changed, so the settings are chosen again" in printed


def test_a_folder_without_captions_leads_to_an_image_only_model(tmp_path):
    photos = make_pictures(tmp_path / "photos", each=10, captions=False)
    out = tmp_path / "run"
    shards = find_shards(str(photos), out, None, [])
    statistics, notes = inspect(shards, out, "cls")
    config = settings(Inputs(statistics, shards, out), MODEL_SIZES[1], 8, 100)
    assert config.model.vocab_size == 0 and config.data.tokenizer is None and statistics.classes == 3 and not notes
    assert not (out / "tokenizer.json").exists()
    assert (config.model.emb_dim, config.model.image_size, config.model.patch_size) == (192, 40, 4)
    shutil.copy(photos / "red/0.png", photos / "stray.png")
    shutil.copytree(photos / "red", tmp_path / "flat")
    for folder, why in ((photos, "but stray.png is not"), (tmp_path / "flat", "fewer than two sub-folders")):
        _, notes = inspect(find_shards(str(folder), tmp_path / f"run-{folder.name}", None, []), out, "cls")
        assert len(notes) == 1 and why in notes[0]
    one = make_pictures(tmp_path / "one", each=1, captions=False)
    for other in sorted(one.rglob("*.png"))[1:]:
        other.unlink()
    one = one.rename(tmp_path / "one.tar")  # the name of the folder does not matter
    alone = find_shards(str(one), tmp_path / "alone", None, [])
    assert not alone.val and any(note.startswith("no samples are held out") for note in alone.notes)


def test_captions_are_read_from_a_table_in_the_folder(tmp_path):
    photos = make_pictures(tmp_path / "photos", each=4, captions=False)
    rows = "".join(f"red/{i}.png,a red thing\n" for i in range(4))
    (photos / "captions.csv").write_text("file_name,caption\n" + rows)
    shards = find_shards(str(photos), tmp_path / "run", None, [])
    assert f"captions and fields are read from {photos / 'captions.csv'}" in shards.notes
    statistics, _ = inspect(shards, tmp_path / "run", "cls")
    assert statistics.vocab_size > 0
    (photos / "sizes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"several tables \(captions.csv, sizes.csv\); choose one with --captions"):
        find_shards(str(photos), tmp_path / "run", None, [])
    named = find_shards(str(photos), tmp_path / "named", photos / "captions.csv", [])
    assert inspect(named, tmp_path / "named", "cls")[0].vocab_size == statistics.vocab_size
    (photos / "sizes.csv").rename(photos / "sizes.txt")
    (photos / "captions.csv").write_bytes("file_name,caption\nred/0.png,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"captions.csv: line 2 is not UTF-8; save it in UTF-8"):
        find_shards(str(photos), tmp_path / "other", None, [])
    (photos / "sizes.txt").rename(photos / "sizes.csv")
    (photos / "captions.csv").unlink()
    notes = find_shards(str(photos), tmp_path / "other", None, []).notes
    own = (photos / "sizes.csv").read_text().splitlines()[0].replace(",", ", ")
    assert notes[0] == f"{photos}/sizes.csv is not used: none of its columns ({own}) has a usual name such as file_name"
    (photos / "sizes.csv").unlink()
    (photos / "Captions.CSV").write_text("file_name,caption\n" + rows)
    notes = find_shards(str(photos), tmp_path / "another", None, []).notes
    assert f"captions and fields are read from {photos / 'Captions.CSV'}" in notes


def test_existing_shards_are_used_unchanged(tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", members(range(4 * i, 4 * i + 4)))
    shards = find_shards(str(tmp_path), tmp_path / "run", None, [])
    assert [os.path.basename(name) for name in (*shards.train, *shards.val)] == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert len(shards.val) == 1 and "held out: the last 1 of 4 shards" in shards.notes
    assert find_shards(f"{tmp_path}/0.tar", tmp_path / "run", None, []).val == []
    given = find_shards(f"{tmp_path}/0.tar", tmp_path / "run", None, [f"{tmp_path}/1.tar"])
    assert given.val == [f"{tmp_path}/1.tar"]
    (tmp_path / "3.tar").rename(tmp_path / "val-3.tar")
    (tmp_path / "2.tar").rename(tmp_path / "testimonials.tar")  # "testimonials" does not mean a test split
    write_tar(tmp_path / "z-interval-4.tar", members(range(16, 20)))  # "val" in "interval" means no split
    assert [os.path.basename(name) for name in find_shards(str(tmp_path), tmp_path, None, []).val] == ["val-3.tar"]
    statistics, notes = inspect(given, tmp_path, "cls")
    assert statistics.classes == 0 and "k-NN accuracy and logistic regression are not computed: " in notes[0]


def test_a_source_that_is_not_that_of_the_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    photos, out = make_pictures(tmp_path / "photos", each=4), tmp_path / "run"
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [(f"{name[0]}{name[2]}.jpg", picture(ord(name[0]) + int(name[2])))])
    kept = find_shards(f"{tmp_path}/a", out, None, []).train
    for other in (f"{tmp_path}/b", str(photos)):
        with pytest.raises(UserError, match=r"the run in .* has another SOURCE, with shards such as .*/a/0.tar"):
            find_shards(other, out, None, [], kept=kept)
    assert not out.exists()
    monkeypatch.chdir(tmp_path)
    assert find_shards("a/*.tar", out, None, [], kept=kept).train
    made = find_shards(str(photos), out, None, []).train
    assert find_shards(str(photos), out, None, [], kept=made).train == made
    with pytest.raises(UserError, match="has another SOURCE"):
        find_shards(f"{tmp_path}/b", out, None, [], kept=made)


def test_duplicate_images_in_folders_and_tables_are_in_the_same_split(tmp_path):
    """Each image has five captions in a table. Copies of a file, and an image in two formats, count as one image."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        (photos / f"{i}.jpg").write_bytes(picture(i))
    names = [f"{i}.jpg" for i in range(20)]
    rows = "".join(f"{name},caption {i} of it\n" for name in names for i in range(5))
    (photos / "captions.csv").write_text("file_name,caption\n" + rows)
    find_shards(str(photos), tmp_path / "run", None, [])
    train, val = (_paths(tmp_path / "run/shards", part) for part in ("train", "val"))
    assert len(val) == 10 and len(set(val)) == 2 and not set(train) & set(val) and len(set(train)) == 18
    (photos / "captions.csv").unlink()
    for i in range(10):
        shutil.copy(photos / f"{i}.jpg", photos / f"copy of {i}.jpg")
        (photos / f"{i + 10}.png").write_bytes(picture(i, fmt="PNG"))
    # These two copies have equal names without the suffix, so they count as one image. Therefore, the images 10 and 11,
    # whose contents they have, are in one group, too.
    shutil.copy(photos / "10.png", photos / "copy of 11.jpg")
    shutil.copy(photos / "11.jpg", photos / "copy of 11.png")
    find_shards(str(photos), tmp_path / "other", None, [])
    train, val = (_paths(tmp_path / "other/shards", part) for part in ("train", "val"))
    image = {name: int(re.findall(r"\d+", name)[0]) for name in train + val}
    image = {name: 10 if number == 11 else number for name, number in image.items()}
    assert len(val) == 4 and not {image[name] for name in train} & {image[name] for name in val}


def test_a_sample_that_is_the_only_one_of_its_class_is_trained_on_and_a_run_keeps_its_labels(tmp_path, monkeypatch):
    photos, out = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(40):
        (photos / f"{number}.jpg").write_bytes(picture(number))
    find_shards(str(photos), tmp_path / "without", None, [])
    drawn = {int(Path(name).stem) for name in _paths(tmp_path / "without/shards", "val")}
    assert len(drawn) == 4
    rare, *_ = sorted(drawn)
    rows = [f"{number}.jpg,{'rare' if number == rare else 0}" for number in range(40)]
    (photos / "table.csv").write_text("\n".join(["image,kind", *rows]))

    def held_out(**options):
        found = find_shards(str(photos), out, None, [], **options)
        return found, {int(Path(name).stem) for name in _paths(out / "shards", "val")}

    options = {"labels": "json.kind", "caption_column": NO_CAPTIONS}
    assert held_out(**options)[1] == drawn - {rare}
    monkeypatch.setattr(source_shards.checkpoint, "saved_steps", lambda _: [1])
    assert held_out(**options | {"labels": "cls"})[1] == drawn - {rare}
    monkeypatch.undo()
    found, images = held_out(**options | {"labels": "cls"})
    assert "--group or --labels has changed" in "\n".join(found.notes) and images == drawn


def test_groups_of_images_are_in_the_same_split_and_a_run_keeps_its_groups(tmp_path, monkeypatch):
    photos, out = tmp_path / "photos", tmp_path / "run"
    for number in range(20):
        (photos / f"{number // 5}").mkdir(parents=True, exist_ok=True)
        (photos / f"{number // 5}/{number}.jpg").write_bytes(picture(number))
    shutil.copy(photos / "3/19.jpg", photos / "3/copy.jpg")
    find_shards(str(photos), out, None, [], group="folder")
    assert len({os.path.dirname(name) for name in _paths(out / "shards", "val")}) == 1
    assert "1 of 21 images are copies of another image" in find_shards(str(photos), out, None, [], group="folder").notes
    (out / "config.json").write_text("{}")
    assert "--group or --labels has changed" in find_shards(str(photos), out, None, []).notes[-2]
    assert len(_paths(out / "shards", "val")) == 2
    monkeypatch.setattr(source_shards.checkpoint, "saved_steps", lambda _: [1])
    with pytest.raises(UserError, match="or --group: has changed since the run in"):
        find_shards(str(photos), out, None, [], group="folder")
    for name, split in enumerate(["train", "val", "test", "test/more"]):
        (photos / str(name)).rename(photos / split)
    with pytest.raises(UserError, match="--group folder: SOURCE is already split"):
        find_shards(str(photos), tmp_path / "other", None, [], group="folder")
    with pytest.raises(UserError, match=r"--group folder: .* consists of shards"):
        find_shards(str(out / "shards"), tmp_path / "other", None, [], group="folder")


def test_a_note_counts_held_out_images_that_are_also_in_the_folder_of_training_images(tmp_path):
    for split, numbers in {"train": range(6), "val": range(4, 8)}.items():
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number in numbers:
            (tmp_path / "photos" / split / f"{split} {number}.jpg").write_bytes(picture(number))
    notes = find_shards(str(tmp_path / "photos"), tmp_path / "run", None, []).notes
    assert "held-out samples whose image also occurs in training shards: 2" in notes


def test_values_of_a_group_that_differ_only_in_their_notation_are_the_same_group(tmp_path):
    photos, rows = tmp_path / "photos", []
    photos.mkdir()
    for number in range(20):
        (photos / f"{number}.jpg").write_bytes(picture(number))
        patient = number // 4
        patient = [patient, float(patient), str(patient), f" {patient} "][number % 4]
        rows.append(json.dumps({"file_name": f"{number}.jpg", "caption": "a", "patient": patient}) + "\n")
    (photos / "table.jsonl").write_text("".join(rows))
    find_shards(str(photos), tmp_path / "run", None, [], group="patient")
    held = {int(Path(name).stem) for name in _paths(tmp_path / "run/shards", "val")}
    assert len(held) == 4 and len({number // 4 for number in held}) == 1


def _paths(folder, split):
    """Return the paths of the images in shards, in order."""
    found = []
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(name))["path"] for name in tar.getnames() if name.endswith(".json")]
    return found


def test_duplicate_images_in_shards_are_in_the_same_split(tmp_path):
    """Samples are removed from held-out shards if their image is also in other shards. If the user names the held-out
    shards, nothing is removed, and a note states the number of such samples."""
    images = {0: (1, 2, 3), 1: (3, 4, 5), 2: (5, 6, 7)}
    for number, numbers in images.items():
        write_tar(tmp_path / f"{number}.tar", [(f"{i}-{number}.jpg", picture(i)) for i in numbers])
    source, out = f"{tmp_path}/{{0..2}}.tar", tmp_path / "run"
    shards = find_shards(source, out, None, [])
    assert shards.val == [f"{out}/held-out/00000-2.tar"] and len(shards.train) == 2
    assert shards.notes == ["held out: the last 1 of 3 shards, except 1 sample whose image also occurs in other shards"]
    with tarfile.open(shards.val[0]) as tar:
        assert tar.getnames() == ["6-2.jpg", "7-2.jpg"]
        assert tar.extractfile("6-2.jpg").read() == picture(6)
    before = os.stat(shards.val[0]).st_mtime_ns
    assert find_shards(source, out, None, []) == shards and os.stat(shards.val[0]).st_mtime_ns == before
    write_tar(tmp_path / "1.tar", [("3-1.jpg", picture(3)), ("6-1.jpg", picture(6))])
    with tarfile.open(find_shards(source, out, None, []).val[0]) as tar:
        assert tar.getnames() == ["5-2.jpg", "7-2.jpg"]  # 6 is also in a training shard
    write_tar(tmp_path / "1.tar", [(f"{i}-1.jpg", picture(i)) for i in images[1]])
    write_tar(tmp_path / "2.tar", [("8-2.jpg", picture(8)), ("5-2.jpg", picture(5))])
    os.utime(tmp_path / "2.tar", ns=(before + 10**9, before + 10**9))
    with tarfile.open(find_shards(source, out, None, []).val[0]) as tar:
        assert tar.getnames() == ["8-2.jpg"]  # the shard has changed
    other = picture(8)[:-1] + b"!"
    write_tar(tmp_path / "2.tar", [("8-2.jpg", other), ("5-2.jpg", picture(5))])  # with the same names and sizes
    os.utime(tmp_path / "2.tar", ns=(time.time_ns() + 10**9,) * 2)
    with tarfile.open(find_shards(source, out, None, []).val[0]) as tar:
        assert tar.extractfile("8-2.jpg").read() == other
    given = find_shards(f"{tmp_path}/0.tar", out, None, [f"{tmp_path}/1.tar"])
    assert given.notes == ["held-out samples whose image also occurs in training shards: 1"]
    shutil.copy(tmp_path / "1.tar", tmp_path / "2.tar")
    nothing = find_shards(source, tmp_path / "other", None, [])
    assert (
        nothing.val == []
        and "no validation set: all images of the last shards also occur in other shards" in nothing.notes[0]
    )


def test_images_that_differ_only_in_their_last_bytes_are_not_duplicates(tmp_path):
    """The sizes and the middle bytes of the images, which are compared first, are equal."""
    same = picture(0, fmt="BMP") + bytes(2 * PIECE)
    for number, end in enumerate((b"one", b"two", b"one")):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.bmp", same + end)])
    assert shared_images([f"{tmp_path}/0.tar"], [f"{tmp_path}/1.tar"]) == {}
    ((shard, places),) = shared_images([f"{tmp_path}/0.tar"], [f"{tmp_path}/2.tar"]).items()
    assert shard == f"{tmp_path}/2.tar" and len(places) == 1


def test_duplicate_images_are_not_searched_if_a_split_is_given_by_a_manifest(tmp_path):
    shard = write_tar(tmp_path / "a.tar", members(range(3)))
    write_manifest(tmp_path / "a.npy", rows_of([shard], [(3, 2, 0)]))
    sides = {"tar": [shard], "npy": [str(tmp_path / "a.npy")]}
    notes = {(one, other): overlap(sides[one], sides[other]) for one in sides for other in sides}
    assert notes.pop(("tar", "tar")) and not any(notes.values())


@pytest.mark.parametrize("seed", range(4))
def test_shared_images_have_equal_bytes_in_both_splits(tmp_path, seed):
    """Some samples have no image, and some images occur twice in a shard. Many have the same size and the same middle
    bytes."""
    draw, middle = random.Random(seed), bytes(2 * PIECE)
    images = [middle + b"one", middle + b"two", b"one" + middle, b"short", b"other", b"longer"]

    def shard(name, choice):
        files = []
        for i in range(8):
            files += [(f"{i}.jpg", draw.choice(choice))] * (draw.random() < 0.8) + [(f"{i}.txt", b"words")]
        return write_tar(tmp_path / name, files)

    known = draw.sample(images, 3)
    train, val = [shard(f"train-{i}.tar", known) for i in range(2)], [shard(f"val-{i}.tar", images) for i in range(2)]

    def places(name):
        with tarfile.open(name) as tar:
            return {m.offset_data: tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")}

    seen = {data for name in train for data in places(name).values()}
    expected = {name: {offset for offset, data in places(name).items() if data in seen} for name in val}
    assert shared_images(train, val) == {name: offsets for name, offsets in expected.items() if offsets}
    assert 0 < sum(map(len, expected.values())) < sum(len(places(name)) for name in val)
    for name, offsets in expected.items():
        left = [data for offset, data in places(name).items() if offset not in offsets]
        assert write_without(name, offsets, tmp_path / "left.tar") and [*places(tmp_path / "left.tar").values()] == left


def test_duplicate_images_of_a_hugging_face_dataset_are_in_the_same_split(tmp_path, monkeypatch):
    """The dataset has one split. Its images are compared by their bytes or by their paths."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = Features({"image": ImageFeature(), "caption": Value("string")})
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    for kind, images in {
        "bytes": [{"bytes": picture(i // 3), "path": f"{i}.jpg"} for i in range(30)],
        "path": [{"bytes": None, "path": f"{tmp_path}/{i // 3}.jpg"} for i in range(30)],
    }.items():
        rows = Dataset.from_dict({"image": images, "caption": [f"{i // 3}" for i in range(30)]}, features=kinds)
        monkeypatch.setattr("m3ae_fast.shards.sources.huggingface.hub_answers", lambda *_: True)
        monkeypatch.setattr("datasets.load_dataset", lambda *_, rows=rows: rows)
        find_shards(f"owner/{kind}", tmp_path / f"run-{kind}", None, [])
        sides = [_texts(tmp_path / f"run-{kind}/shards/{part}-00000.tar") for part in ("train", "val")]
        assert not set(sides[0]) & set(sides[1]) and len(sides[1]) == 3


def _texts(shard):
    with tarfile.open(shard) as tar:
        return [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".txt")]


def test_the_splits_of_a_hugging_face_dataset_are_used(tmp_path, monkeypatch):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    names = Features({"image": ImageFeature(), "label": ClassLabel(names=["no", "yes"]), "text": Value("string")})
    pictures = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(4)]
    rows = {"image": pictures, "label": [0, 1, 0, 1], "text": ["a", "b", "c", "d"]}
    split = Dataset.from_dict(rows, features=names)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "set"))
    shards = find_shards(str(tmp_path / "set"), tmp_path / "run", None, [])
    assert [shards.train, shards.val] == [[f"{tmp_path}/run/shards/{name}-*.tar"] for name in ("train", "test")]
    statistics, notes = inspect(shards, tmp_path / "run", "cls")
    assert (statistics.samples, statistics.held_out, statistics.classes, notes) == (
        4,
        4,
        2,
        [],
    ) and statistics.vocab_size
    monkeypatch.setattr("m3ae_fast.shards.sources.huggingface.hub_answers", lambda *_: True)
    monkeypatch.setattr("datasets.load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("the Hub is far")))
    with pytest.raises(UserError, match="nowhere: no such folder; it was also tried as the name of a dataset: "):
        find_shards("nowhere", tmp_path / "other", None, [])


def test_pretrain_on_several_ranks_is_refused_and_the_training_program_is_named(tmp_path, monkeypatch, capsys):
    """If several ranks ran `pretrain`, each of them would create the shards and the report."""
    monkeypatch.setattr("m3ae_fast.cli.command_line._FIRST_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert exit_cleanly(lambda: main([str(tmp_path), "--out", str(tmp_path / "run")])) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: pretrain runs as a single process; on several GPUs") == (rank == "0")
    with pytest.raises(UserError, match="pretrain runs as a single process"):
        pretrain(tmp_path, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_splits_and_classes_of_an_hdf5_file_are_used(tmp_path):
    images = [np.frombuffer(picture(number), dtype=np.uint8) for number in range(6)]
    with h5py.File(tmp_path / "images.h5", "w") as file:
        for split, chosen in (("train", images[:4]), ("val", images[4:])):
            jpg = file.create_dataset(f"{split}_jpg", (len(chosen),), h5py.vlen_dtype(np.uint8))
            for row, image in enumerate(chosen):
                jpg[row] = image
            file[f"{split}_labels"] = np.arange(len(chosen)) % 2
    shards = find_shards(str(tmp_path / "images.h5"), tmp_path / "run", None, [])
    assert [shards.train, shards.val] == [[f"{tmp_path}/run/shards/{name}-*.tar"] for name in ("train", "val")]
    statistics, _ = inspect(shards, tmp_path / "run", "cls")
    assert (statistics.samples, statistics.held_out, statistics.classes) == (4, 2, 2)


def test_a_folder_of_parquet_files_is_read_as_by_shards_make(tmp_path):
    from datasets import Dataset

    rows = {"image": [{"bytes": picture(number), "path": None} for number in range(10)], "text": ["a caption"] * 10}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "set/data.parquet"))
    shards = find_shards(str(tmp_path / "set"), tmp_path / "run", None, [])
    statistics, _ = inspect(shards, tmp_path / "run", "cls")
    assert (statistics.samples, statistics.held_out) == (9, 1)


def test_user_errors_are_reported_before_any_output_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = make_pictures(tmp_path / "photos", each=2)
    out, table, kept, bare = (tmp_path / name for name in ("run", "t.jsonl", "kept", "bare"))
    table.touch()
    (bare / "checkpoints/step-00000002").mkdir(parents=True)
    for name in ("state.json", "state.safetensors"):
        (bare / "checkpoints/step-00000002" / name).touch()
    kept.mkdir()
    (kept / "config.json").touch()
    for arguments, options, message in (
        ((photos, photos / "run"), {}, "figures written to it would be read as input images"),
        ((photos, photos), {}, "figures written to it would be read as input images"),
        ((f"{tmp_path}/nothing", out), {}, "is neither a folder"),
        ((f"{tmp_path}/fotos", out), {}, r"is neither a folder.*; did you mean .*/photos\?"),
        ((table, out), {}, r"is neither a folder.*; to use a table, .* add --captions .*t\.jsonl$"),
        (("fotos", out), {}, r"fotos: no such folder; did you mean photos\?"),
        (("", out), {}, "SOURCE is empty"),
        ((photos, kept), {"dry_run": True}, "--dry-run: .* contains a run, whose settings are kept"),
        ((photos, bare), {}, "contains checkpoints, but not the config.json of their run; choose another --out"),
        ((photos, out), {"labels": "class"}, "labels 'class': must be cls, or json.FIELD"),
        ((photos, out), {"hours": 0}, "hours 0: must be greater than 0"),
        ((photos, next(photos.rglob("*.png"))), {}, "is not a folder; specify a new or an existing folder"),
        ((photos, out), {"val": ["a.tar"]}, "--val: can be used only if SOURCE consists of shards"),
        (("a.tar", out), {"captions": "a.csv"}, "only if SOURCE is a folder of images; a.tar is not"),
        (("owner/set", out), {"captions": "a.csv"}, "only if SOURCE is a folder of images; owner/set is not"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(*arguments, **options)
        assert not out.exists() and [path.name for path in kept.iterdir()] == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_bach=2", r"overrides: unknown key train.global_bach; did you mean train.global_batch\?"),
        ("train.global_batch=many", r"overrides: train.global_batch: input should be a valid integer \(got \"many\"\)"),
        ("train.global_batch", r"override train.global_batch: must have the form section.key=value"),
        ("model.num_heads=5", r"overrides: model: emb_dim \d+ is not divisible by num_heads 5"),
        ("model.image_size=50", r"overrides: model: image_size 50 is not divisible by patch_size 4"),
        ("run.dir=x", "override run.dir: use --out instead"),
    ],
)
def test_an_invalid_override_is_reported_before_any_output_is_written(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        pretrain(tmp_path / "nothing", tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_images_are_not_enlarged_and_have_at_least_eight_patches_per_side_if_possible():
    assert image_and_patch(500, 224) == (224, 16)
    assert image_and_patch(500, 96) == (96, 8)
    assert image_and_patch(37, 96) == (36, 4)
    assert image_and_patch(8, 96) == (16, 4)
    for side, most in itertools.product(range(1, 301), (16, 48, 96, 224)):
        room = max(min(side, most), 16)
        patch = max(p for p in (4, 8, 16) if 8 * p <= room or p == 4)
        assert image_and_patch(side, most) == (max(range(0, room + 1, patch)), patch)


def test_steps_and_batch_size_fit_the_data_and_the_time():
    assert [batch_of(samples) for samples in (12, 54, 450, 1536, 50_000, 10**6)] == [2, 8, 64, 64, 1024, 1024]
    assert steps_in(100, step=0.1, batch=10, samples=10**6) == 1000
    assert steps_in(10**9, step=0.1, batch=10, samples=100) == automatic_settings.LONGEST * 10
    assert automatic_settings.fitted_batch(100, lambda batch: 0.001 * batch, samples=50_000) == 64
    assert automatic_settings.fitted_batch(1000, lambda batch: 0.5 + 0.001 * batch, samples=50_000) == 256
    assert automatic_settings.reaches(100_000, samples=5000) and not automatic_settings.reaches(99_999, samples=5000)
    assert automatic_settings.reaches(20_000, samples=9) and not automatic_settings.reaches(19_999, samples=9)


@given(samples=st.integers(1, 10**7), pace=st.floats(1e-5, 10), seconds=st.floats(1, 1e6))
@hypothesis_settings(max_examples=100, derandomize=True, deadline=None)
@example(samples=96, pace=1.0, seconds=1.0)
@example(samples=256, pace=0.001, seconds=64.0)
@example(samples=24 * 128, pace=0.01, seconds=1280.0)
@example(samples=24 * 2048, pace=0.001, seconds=1024.0)
@example(samples=3, pace=0.001, seconds=1e6)
def test_batch_size_and_steps_are_the_largest_within_their_bounds(samples, pace, seconds):
    def fits(batch):
        """Return whether a batch size is allowed: an epoch must have at least 24 steps. With at most 64 samples per
        batch, 4 steps are enough."""
        return batch == 1 or (batch <= 1024 and batch * (24 if batch > 64 else 4) <= samples)

    batch = batch_of(samples)
    assert batch.bit_count() == 1 and fits(batch) and not fits(2 * batch)
    fitted = automatic_settings.fitted_batch(seconds, lambda batch: pace * batch, samples)
    halves = [batch >> i for i in range(11) if batch >> i >= min(64, batch)]
    enough = [each for each in halves if seconds / (pace * each) >= 1000]
    assert fitted == max(enough, default=halves[-1])
    steps, most = steps_in(seconds, pace * fitted, fitted, samples), 800 * max(samples // fitted, 1)
    assert 2 <= steps <= most
    assert steps == 2 or steps * fitted * pace <= seconds * (1 + 1e-9)
    assert steps == most or (steps + 1) * fitted * pace > seconds * (1 - 1e-9)


def test_the_last_value_of_an_override_is_used_and_null_or_0_disables_it():
    assert automatic_settings.given(["a.b=3", "a.b=5", "a.bc=7"], "a.b") == 5
    for text in ("null", "0", "-4", "4.0", "x", ""):
        assert automatic_settings.given(["a.b=3", f"a.b={text}"], "a.b") is None
    assert automatic_settings.given([], "a.b") is None


def test_each_model_size_has_a_minimum_number_of_samples():
    for size in MODEL_SIZES:
        own = DatasetStatistics(int(size.samples), 0, 1, [0.5] * 3, [0.2] * 3, classes=0, vocab_size=0, text_length=8)
        assert automatic_settings.model_sizes(own)[-1].samples == size.samples
        assert (
            size.samples == 0
            or automatic_settings.model_sizes(replace(own, samples=own.samples - 1))[-1].samples < size.samples
        )


def test_automatic_settings_equal_those_of_the_rules_computed_by_hand():
    def chosen(samples, steps, batch=64, held_out=2000, words=512, size=1):
        statistics = DatasetStatistics(
            samples, held_out, 100, [0.5] * 3, [0.2] * 3, classes=3, vocab_size=words, text_length=24
        )
        shards = Shards(["a.tar"], ["b.tar"] if held_out else [], [])
        return settings(Inputs(statistics, shards, Path("r"), labels="json.kind"), MODEL_SIZES[size], batch, steps)

    config = chosen(samples=6400, steps=4000)
    t, o = config.train, config.optim
    assert (t.log_every, t.eval_every, t.save_every, t.eval_samples, t.global_batch) == (80, 200, 400, 1024, 64)
    assert (o.warmup_epochs, o.clip_grad) == (2.0, 1.0)  # a twentieth of 40 epochs
    assert (config.data.crop_scale, config.loss.norm_pix) == ((0.4, 1.0), True)
    assert (t.probe.every, t.probe.labels, t.probe.k) == (None, "json.kind", KnnProbeConfig.model_fields["k"].default)
    assert [(own[0].shards, own[0].modality) for own in (t.probe.train, t.probe.val)] == [
        (["a.tar"], "image"), (["b.tar"], "image")
    ]  # fmt: skip
    assert (config.model.text_length, config.model.vocab_size) == (24, 512)
    few = chosen(samples=5000, steps=30, held_out=0, words=0)
    assert (few.train.log_every, few.train.eval_every, few.train.save_every) == (1, 10, 10)
    assert (few.train.eval_samples, few.data.val, few.data.tokenizer, few.train.probe.every) == (1, [], None, 10)
    assert chosen(samples=5000, steps=5).train.eval_every == 5
    assert automatic_settings.peak_rate(4096, 768) == 1.5e-4  # the learning rate of MAE
    # The learning rate of a step is proportional to the square root of the batch size, so a quarter of the batch has
    # half of the rate. `peak_lr` is the rate for a batch of 256, to which a step applies the factor batch / 256; it is
    # therefore doubled.
    assert automatic_settings.peak_rate(1024, 384) == 3e-4
    assert chosen(samples=6400, steps=9, size=2).optim.peak_lr == 1.2e-3 == automatic_settings.peak_rate(64, 383) / 4


def test_statistics_are_computed_from_the_training_samples(tmp_path):
    """The statistics include the median short side, the length that 95 % of captions do not exceed, and a vocabulary
    that the captions can fill."""
    files = []
    for i in range(20):
        files.append((f"{i}.png", picture(i, (60 + i % 3, 20 if i < 9 else 30), fmt="PNG")))
        files.append((f"{i}.txt", b"one two three " * (30 if i == 19 else 4)))
    train, val = write_tar(tmp_path / "a.tar", files), write_tar(tmp_path / "b.tar", members(range(3)))
    statistics, _ = inspect(Shards([train], [val], []), tmp_path / "run", "cls")
    assert (statistics.samples, statistics.held_out, statistics.short_side, statistics.classes) == (20, 3, 30, 0)
    tokenizer = load_tokenizer(str(tmp_path / "run/tokenizer.json"), 1 << 16)
    lengths = [len(tokenizer.encode(text.decode())) for name, text in files if name.endswith("txt")]
    assert statistics.text_length == min(64, -(-sorted(lengths)[18] // 8) * 8) < lengths[19]
    assert statistics.vocab_size == tokenizer.vocab_size <= 512
    means = [np.asarray(Image.open(BytesIO(data)).convert("RGB")).mean((0, 1)) / 255 for _, data in files[::2]]
    assert statistics.image_mean == pytest.approx(np.mean(means, 0), abs=2e-4)


@pytest.mark.parametrize(("words", "length"), [(0, 8), (8, 8), (9, 16), (40, 40), (57, 64), (64, 64), (300, 64)])
def test_most_captions_are_not_truncated_and_none_exceeds_64_tokens(tmp_path, words, length):
    files = [file for i in range(3) for file in ((f"{i}.jpg", picture(i)), (f"{i}.txt", b"one " * words))]
    statistics, _ = inspect(Shards([write_tar(tmp_path / "a.tar", files)], [], []), tmp_path / "run", "cls")
    assert statistics.text_length == length and (statistics.held_out, statistics.classes) == (0, 0)


@pytest.mark.parametrize(("captions", "wanted"), [(1, 512), (724, 512), (725, 1024), (2896, 2048), (10**5, 16384)])
def test_the_vocabulary_size_grows_with_the_number_of_captions(tmp_path, monkeypatch, captions, wanted):
    asked, train = [], look_module.train_tokenizer
    monkeypatch.setattr(look_module, "caption_texts", lambda *_: iter(["one two"] * captions))
    monkeypatch.setattr(look_module, "train_tokenizer", lambda texts, size: asked.append(size) or train(texts[:9], 20))
    inspect(Shards([write_tar(tmp_path / "a.tar", members(range(2)))], [], []), tmp_path / "run", "cls")
    assert asked == [wanted]


def test_classes_are_those_of_the_training_samples(tmp_path):
    def labelled(name, classes):
        pairs = (
            ((f"{i}.png", picture(i, fmt="PNG")), (f"{i}.cls", b"%d" % classes[i % len(classes)])) for i in range(6)
        )
        return write_tar(tmp_path / name, [file for pair in pairs for file in pair])

    train = labelled("a.tar", (0, 1))
    for classes, count in (((0, 1), 2), ((1,), 2), ((0, 1, 2), 0)):
        statistics, notes = inspect(Shards([train], [labelled("b.tar", classes)], []), tmp_path / "run", "cls")
        assert statistics.classes == count and bool(notes) == (count == 0)
    assert "k-NN accuracy and logistic regression are not computed: " in notes[0]


def test_labels_that_cannot_be_used_are_no_obstacle_to_training(tmp_path):
    files = [(f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("jpg", picture(i)), ("cls", b"cat"))]
    shards = [write_tar(tmp_path / name, files) for name in ("a.tar", "b.tar")]
    statistics, notes = inspect(Shards(shards[:1], shards[1:], []), tmp_path / "run", "cls")
    assert statistics.classes == 0
    assert "its cls member must be an integer of at most 18 digits, but is 'cat'" in notes[0]


def test_samples_without_images_are_refused_before_a_tokenizer_is_trained(tmp_path):
    texts = write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"some words") for i in range(9)])
    with pytest.raises(UserError, match="none of the 9 training samples has an image"):
        inspect(Shards([texts], [], []), tmp_path / "run", "cls")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sample", "world", "trials"),
    [
        (0.01, 1, [(8, 2.5), (166, 10)]),
        (0.1, 1, [(8, 2.5), (16, 10)]),
        (0.2, 1, [(8, 2.5)]),
        (0.05, 12, [(12, 2.5), (33, 10)]),
    ],
)
def test_throughput_is_measured_with_the_largest_batch_of_which_six_steps_fit_the_time(
    monkeypatch, sample, world, trials
):
    """Every rank has at least one sample."""
    tried = []
    monkeypatch.setattr(
        throughput_estimate,
        "measure_batch",
        lambda *given: tried.append(given[2:]) or ThroughputEstimate(sample, given[2], 4),
    )
    config = parse(Config, TINY | {"train": TINY["train"] | {"global_batch": 1024, "steps": 9}}, "test")
    session = SimpleNamespace(ranks=SimpleNamespace(world=world))
    assert throughput_estimate.measure(config, session, 10).batch == trials[-1][0]
    assert tried == trials


def test_a_measurement_neither_ends_by_itself_nor_writes_to_the_run_folder(monkeypatch):
    configs = []

    def set_up(config, *_):
        configs.append(config)
        raise Stopped

    monkeypatch.setattr(throughput_estimate, "set_up", set_up)
    config = parse(Config, TINY | {"train": TINY["train"] | {"hours": 1.0}}, "test")
    with pytest.raises(Stopped):
        throughput_estimate.measure_batch(config, SimpleNamespace(ranks=SimpleNamespace(is_main=False)), 4, 1.0)
    (measured,) = configs
    assert (measured.train.global_batch, measured.train.hours, measured.run.loggers) == (4, None, [])
    assert measured.train.steps > 10**9 and measured.run.dir != config.run.dir


def test_the_time_of_a_step_begins_at_the_end_of_the_previous_step(monkeypatch):
    clock = iter((100.0, 101.0, 101.4, 101.5, 103.0, 103.8, 104.0))
    for module in (throughput_estimate, device_clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    taken, ranks = [], SimpleNamespace(device=torch.device("cpu"))
    engine = SimpleNamespace(before_update=lambda: taken.append("update"))
    inputs = [(SimpleNamespace(waited=waited), "counts") for waited in (0.2, 0.3)]
    trainer = SimpleNamespace(inputs=lambda: inputs, engine=engine, ranks=ranks)

    def take_step(*what):
        taken.append(what)
        engine.before_update()
        return None, torch.tensor(1.0)

    trainer.take_step = take_step
    times = throughput_estimate.step_times(trainer)
    assert [*next(times), *next(times)] == pytest.approx([1.5, 0.4, 0.2, 2.5, 0.8, 0.3])
    assert taken == [inputs[0], "update", inputs[1], "update"]
    with pytest.raises(Stopped):  # a rank is asked to stop
        next(times)


def test_the_updates_of_a_gpu_are_measured_with_events(monkeypatch):
    """Only when the gradients of a step have been computed is it certain that a GPU has finished the update of the
    previous step. Therefore, the measured duration is that of the previous update."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = 100.0 * len(recorded) ** 2
            recorded.append(self)

        def elapsed_time(self, other):
            # torch raises an error if the GPU has not reached the later event yet
            assert recorded.index(other) + 2 < len(recorded)
            return other.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    engine = SimpleNamespace(before_update=lambda: None)
    ranks = SimpleNamespace(device=torch.device("cuda"))
    inputs = [(SimpleNamespace(waited=0.0), "counts")] * 3
    trainer = SimpleNamespace(inputs=lambda: inputs, engine=engine, ranks=ranks)
    trainer.take_step = lambda *_: engine.before_update() or (None, torch.tensor(1.0))
    times = throughput_estimate.step_times(trainer)
    assert [next(times).update for _ in range(3)] == pytest.approx([0.0, 0.1, 0.5])


def paced(monkeypatch, times, ahead=0, seconds=60.0, update=0.0, waiting=(0.0, 0.0), from_main=lambda value: value):
    """Return the pace that is measured in a run with these step times and batches of 4 samples. `update`: seconds of
    each update; `waiting`: fractions of the time that this rank and another one wait for data; `from_main`: function
    that returns the main rank's value."""
    clock = [0.0]

    def steps(run):
        for each in times:
            clock[0] += each
            yield StepTime(each, update, waiting[0] * each)

    monkeypatch.setattr(throughput_estimate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(throughput_estimate, "set_up", lambda *_: None)
    monkeypatch.setattr(throughput_estimate, "step_times", steps)
    monkeypatch.setattr(throughput_estimate, "batches_ahead", lambda run: ahead)
    monkeypatch.setattr(throughput_estimate, "gc", SimpleNamespace(collect=lambda: None))
    config = parse(Config, TINY | {"train": TINY["train"] | {"global_batch": 4, "steps": 9}}, "test")
    session = one_rank()
    session.ranks.gather, session.ranks.from_main = lambda value: [value, waiting[1]], from_main
    return throughput_estimate.measure_batch(config, session, 4, seconds)


def test_throughput_is_computed_from_the_second_half_of_the_steps(monkeypatch):
    """The first steps are faster, because their batches were loaded in advance."""
    found = paced(monkeypatch, [9.0, 9.0, *[0.001] * 27, *[0.002] * 27], ahead=27)
    assert found == ThroughputEstimate(pytest.approx(0.002 / 4), 4, 27, pytest.approx(0.0))


def test_throughput_is_measured_until_it_is_stable(monkeypatch):
    """Measuring ends when the later half of the steps has a constant pace, or when the time is used up."""
    calm = [9.0, 9.0, *[0.001] * 1000]
    assert paced(monkeypatch, calm).steps == 19  # the later half of 38 steps: of 40, the first two are not counted
    # measuring uses a quarter of the time: 18 s for two slow steps, and the rest for 500 fast ones
    assert paced(monkeypatch, calm, seconds=74.0).steps > 200
    falling = [9.0, 9.0, *(0.5 / (each + 1) for each in range(40)), *[0.01] * 1000]
    assert paced(monkeypatch, falling).sample == pytest.approx(0.01 / 4, rel=0.1)
    noisy = [9.0, 9.0, *np.random.RandomState(0).exponential(0.01, 10_000)]
    found = paced(monkeypatch, noisy)
    assert found.sample == pytest.approx(0.01 / 4, rel=4 * found.error) and found.error < 0.02
    wild = [9.0, 9.0, *(0.01 * 3 ** (each // 100 % 2) for each in range(10_000))]
    assert paced(monkeypatch, wild, seconds=90.0).sample == pytest.approx(0.02 / 4, rel=0.1)
    rising = [9.0, 9.0, *(0.01 * 1.02**each for each in range(1000))]
    found = paced(monkeypatch, rising)
    assert found.error > 0.1 and found.steps < 200
    updated = paced(monkeypatch, rising, update=0.05)  # the error is a fraction of the step without the update
    assert updated.error * updated.sample == pytest.approx(found.error * found.sample, rel=0.01)
    too_few = paced(monkeypatch, [5.0] * 10, seconds=1.0)  # too few steps for a standard error
    assert too_few == ThroughputEstimate(5 / 4, 4, 1)
    updated = paced(monkeypatch, [5.0] * 10, seconds=1.0, update=4.0)
    assert updated == ThroughputEstimate(1 / 4, 4, 1, update=4.0) and updated.step(100) == 29.0


def test_all_ranks_use_the_measurements_of_the_main_rank(monkeypatch):
    """If ranks used their own measurements, they would measure different numbers of steps, or choose different batches
    for the second trial."""
    sent = []
    first = paced(monkeypatch, [0.5] * 99, update=0.2, seconds=9.0, from_main=lambda value: sent.append(value) or value)
    received = iter(sent)
    other = paced(monkeypatch, [1.5] * 99, update=0.1, seconds=9.0, from_main=lambda _: next(received))
    assert other == first and [*received] == []


@pytest.mark.parametrize(("workers", "steps"), [(0, 0), (2, 3)])
def test_batches_that_are_loaded_in_advance_are_counted_in_steps(workers, steps):
    """Each worker loads three micro-batches in advance, and a step has two."""
    loader = DataLoader([0], num_workers=workers, prefetch_factor=3 if workers else None)
    trainer = SimpleNamespace(train_loader=loader, share=SimpleNamespace(accumulation=2))
    assert throughput_estimate.batches_ahead(trainer) == steps


def simulated(monkeypatch, update, sample):
    """Replace the clock and the engine of throughput measurements. `update`: seconds per update; `sample`: function
    that returns the seconds per sample for the width of a model. The batches measured are added to the list that is
    returned."""
    clock, measured = [0.0], []

    def set_up(config, *_):
        batch, per_sample = config.train.global_batch, sample(config.model.emb_dim)
        measured.append(batch)
        engine = SimpleNamespace(before_update=lambda: None)

        def take_step(inputs, counts):
            clock[0] += batch * per_sample
            engine.before_update()
            clock[0] += update
            return None, torch.tensor(1.0)

        ranks = SimpleNamespace(device=torch.device("cpu"))
        steps = itertools.repeat((SimpleNamespace(waited=0.0), "counts"))
        return SimpleNamespace(engine=engine, ranks=ranks, inputs=lambda: steps, take_step=take_step)

    now = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: 0.0)
    for module in (throughput_estimate, device_clock, size_and_length):
        monkeypatch.setattr(module, "time", now)
    monkeypatch.setattr(throughput_estimate, "set_up", set_up)
    monkeypatch.setattr(throughput_estimate, "batches_ahead", lambda run: 0)
    monkeypatch.setattr(throughput_estimate, "gc", SimpleNamespace(collect=lambda: None))
    monkeypatch.setattr(size_and_length, "missing_memory", lambda *_: "")
    return measured


def one_rank():
    """Return a session of one rank that runs on the CPU and prints nothing."""
    ranks = SimpleNamespace(world=1, is_main=False, from_main=lambda value: value, device=torch.device("cpu"))
    ranks.gather = lambda value: [value]
    return SimpleNamespace(ranks=ranks)


@pytest.mark.parametrize(("limit", "batches"), [(5.0, [8]), (30.0, [8, 23])])
def test_the_time_of_an_update_is_not_scaled_with_the_batch_size(monkeypatch, limit, batches):
    """Muon takes 2.8 s per update of "small" on a core, and 0.094 s per sample for everything else."""
    measured = simulated(monkeypatch, 2.8, lambda width: 0.094)
    config = parse(Config, TINY | {"train": TINY["train"] | {"global_batch": 4096, "steps": 9}}, "test")
    pace = throughput_estimate.measure(config, one_rank(), limit)
    assert measured == batches
    assert (pace.sample, pace.update, pace.step(4096)) == pytest.approx((0.094, 2.8, 2.8 + 4096 * 0.094))
    assert f"9 steps of {2.8 + 4096 * 0.094:.3g} s" in pace.sentence(
        config, Schedule(config.train, config.optim, 10**6)
    )


@pytest.mark.parametrize(
    ("update", "samples", "size", "batch"),
    [
        (0.0, 20_000, 384, 512),
        (2.8, 20_000, 384, 512),
        (2.8, 100_000, 192, 1024),
        (60.0, 20_000, 192, 512),
        (100.0, 20_000, 128, 128),
    ],
)
def test_size_batch_and_length_take_the_time_of_an_update_into_account(monkeypatch, update, samples, size, batch):
    """Every size except the smallest is chosen only if it can train for 20 epochs in 30 hours. The batch is halved
    until there are 1,000 steps."""
    simulated(monkeypatch, update, lambda width: 0.094 * width / 384)
    statistics, shards = small(samples=samples), Shards(["a.tar"], ["b.tar"], [])
    found = size_and_length.choose(Inputs(statistics, shards, Path("r")), 30.0, one_rank(), 0.0)
    train, step = found.config.train, update + batch * 0.094 * size / 384
    assert (found.config.model.emb_dim, train.global_batch) == (size, batch)
    assert 0.9 * 30 * 3600 < train.steps * step < 30 * 3600
    assert f"at {batch / step:,.{0 if batch / step >= 10 else 2}f} samples/s" in found.lines[3]


@pytest.mark.parametrize("waiting", [(0.4, 0.1), (0.1, 0.4)])
def test_the_wait_for_data_is_that_of_the_rank_that_waits_longest(monkeypatch, waiting):
    assert paced(monkeypatch, [9.0, 9.0, *[0.01] * 1000], waiting=waiting).data_wait == pytest.approx(0.4)


def test_throughput_is_printed_with_its_standard_error():
    assert ThroughputEstimate(1 / 97, 8, 24, 0.06).rate(64) == "97 ± 6 samples/s, measured over 24 steps"
    assert ThroughputEstimate(1 / 5.23, 8, 24, 0.02).rate(64) == "5.23 ± 0.10 samples/s, measured over 24 steps"
    assert ThroughputEstimate(1 / 5.23, 8, 1).rate(64) == "5.23 samples/s, measured over 1 step"
    assert ThroughputEstimate(0.01, 8, 1, update=0.5).rate(50) == "50 samples/s, measured over 1 step"
    # the update takes half of the step, and the error applies only to the other half
    assert ThroughputEstimate(0.01, 8, 24, 0.2, update=0.5).rate(50) == "50 ± 5 samples/s, measured over 24 steps"


@pytest.mark.parametrize(("every", "val", "evaluations"), [(25, True, 5), (None, True, 2), (25, False, 0)])
def test_the_estimated_time_of_a_run_includes_steps_and_evaluations(every, val, evaluations):
    """An evaluated sample takes two thirds of the time of a training sample."""
    data = TINY["data"] | ({} if val else {"val": []})
    train = TINY["train"] | {"steps": 100, "global_batch": 10, "eval_every": every, "eval_samples": 6}
    config = parse(Config, TINY | {"data": data, "train": train}, "test")
    schedule = Schedule(config.train, config.optim, 50)
    assert ThroughputEstimate(0.5, 10, 4).seconds(config, schedule) == 0.5 * (1000 + evaluations * 6 * 2 / 3)
    updated = ThroughputEstimate(0.5, 10, 4, update=3.0).seconds(config, schedule)
    assert updated == 300 + 0.5 * (1000 + evaluations * 6 * 2 / 3)  # an evaluation has no updates
    assert "of 8 samples, scaled to the full batch" in ThroughputEstimate(0.5, 8, 4).sentence(config, schedule)
    assert "100 steps of 5 s, measured over 4 steps" in (
        text := ThroughputEstimate(0.5, 10, 4).sentence(config, schedule)
    )
    assert "scaled" not in text and "adjusts" not in text
    limited = config.model_copy(update={"train": config.train.model_copy(update={"hours": 1.0})})
    adjusted = ThroughputEstimate(0.5, 10, 4).sentence(limited, schedule)
    assert adjusted == f"{text}; train.hours adjusts the number of steps"


def test_a_model_size_that_exceeds_the_memory_is_not_tried(tmp_path, monkeypatch):
    statistics = DatasetStatistics(20_000, 100, 100, [0.5] * 3, [0.2] * 3, classes=0, vocab_size=0, text_length=8)
    tried, needed = [], []
    monkeypatch.setattr(
        size_and_length,
        "measure",
        lambda config, *_: tried.append(config.model.emb_dim) or ThroughputEstimate(1e-4, 8, 4),
    )
    monkeypatch.setattr(
        size_and_length,
        "missing_memory",
        lambda size, device: needed.append(size) or ("8 GB are needed" if len(needed) > 1 else ""),
    )
    session = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")))
    found = size_and_length.choose(
        Inputs(statistics, Shards(["a.tar"], [], []), tmp_path), 1.0, session, time.monotonic()
    )
    sizes = [
        settings(Inputs(statistics, Shards(["a.tar"], [], []), tmp_path), size, 64, 1) for size in MODEL_SIZES[1:3]
    ]
    assert needed == [memory_needed(config, 1, 64) for config in sizes]
    assert tried == [128, 192] and found.config.model.emb_dim == 192
    assert '"small" does not fit into memory: 8 GB are needed' in found.lines[1]
    assert "at 10,000 samples/s, measured over 4 steps" in found.lines[3]


@pytest.mark.parametrize("ends", ["slow", "memory", None])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_model_sizes_are_tried_from_the_smallest_to_the_first_unsuitable_one(tmp_path, monkeypatch, ends, place):
    """No larger size is tried, even if it would fit."""
    statistics = DatasetStatistics(2_000_000, 100, 300, [0.5] * 3, [0.2] * 3, classes=0, vocab_size=0, text_length=8)
    widths, tried, reckoned = [128, 192, 384, 768, 1024], [], []

    def measure(config, session, limit):
        tried.append(config.model.emb_dim)
        return ThroughputEstimate(
            1.0 if ends == "slow" and widths.index(tried[-1]) == place else 1e-6 * tried[-1], 8, 4
        )

    def missing(needed, device):
        reckoned.append(needed)
        return "8 GB are needed" if ends == "memory" and len(reckoned) == place else ""

    monkeypatch.setattr(size_and_length, "measure", measure)
    monkeypatch.setattr(size_and_length, "missing_memory", missing)
    session = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")))
    found = size_and_length.choose(
        Inputs(statistics, Shards(["a.tar"], [], []), tmp_path), 1000.0, session, time.monotonic()
    )
    chosen = place - 1 if ends else 4
    assert found.config.model.emb_dim == widths[chosen]
    assert tried == widths[: chosen + 1 + (ends == "slow")] and len(reckoned) == (place if ends else 4)
    rate = f"{1 / (1e-6 * widths[chosen]):,.0f} samples/s"
    assert rate in found.lines[3]  # the pace of this size, and not that of a size that was tried later


@pytest.mark.parametrize(("end", "dry_run", "code", "printed"), [
    (True, False, 0, ""), (False, False, 0, "stopped; run the same command again to resume"), (False, True, 0, ""),
    (None, False, 130, ""),
])  # fmt: skip
def test_the_pretrain_command_passes_on_its_arguments(monkeypatch, capsys, end, dry_run, code, printed):
    calls = []

    def pretrain(*args, **options):
        calls.append((args, options))
        if end is None:
            raise KeyboardInterrupt
        return SimpleNamespace(finished=end)

    monkeypatch.setattr(stages, "pretrain", pretrain)
    line = ["photos", "--out", "run", "--hours", "3", "--captions", "a.csv", "--val", "b.tar", "c.tar"]
    line += ["--image-column", "file"]
    line += ["--group", "folder"]
    line += ["--from", "base", "--labels", "json.kind", "--set", "train.global_batch=8"]
    line += ["--dry-run"] * dry_run
    assert main(line) == code
    given = {"hours": 3.0, "captions": Path("a.csv"), "val": ["b.tar", "c.tar"], "labels": "json.kind"}
    given |= {"start_from": "base", "overrides": ["train.global_batch=8"], "dry_run": dry_run}
    given |= {"device": None, "recipe": None, "image_column": "file", "caption_column": None, "group": "folder"}
    given |= {"source": "photos", "out": Path("run"), "seed": None, "teacher": None}
    assert calls == [((), given)]
    out, err = capsys.readouterr()
    assert (out.strip(), err.strip()) == (
        printed,
        "stopped; run the same command again to resume" if end is None else "",
    )


@pytest.mark.parametrize(("hours", "seconds"), [(1.0, 30.0), (0.05, 3.6)])
def test_a_throughput_trial_takes_a_small_and_limited_part_of_the_time(tmp_path, monkeypatch, hours, seconds):
    """A trial runs in the precision of the run."""
    statistics, trials = (
        DatasetStatistics(9000, 100, 100, [0.5] * 3, [0.2] * 3, classes=0, vocab_size=0, text_length=8),
        [],
    )

    def measure(config, session, limit):
        trials.append((config.train.precision, pytest.approx(limit)))
        return ThroughputEstimate(1e-4, 8, 4)

    monkeypatch.setattr(size_and_length, "measure", measure)
    monkeypatch.setattr(size_and_length, "missing_memory", lambda size, device: "")
    device = torch.device("cpu")
    session = SimpleNamespace(ranks=SimpleNamespace(device=device))
    size_and_length.choose(Inputs(statistics, Shards(["a.tar"], [], []), tmp_path), hours, session, time.monotonic())
    assert trials == [(fast_precision(device), pytest.approx(seconds))] * 2


def test_automatic_settings_yield_to_and_fit_the_settings_of_the_user():
    statistics = DatasetStatistics(1000, 100, 40, [0.5] * 3, [0.2] * 3, classes=2, vocab_size=512, text_length=8)

    def chosen(*overrides):
        return settings(
            Inputs(statistics, Shards(["a.tar"], ["b.tar"], []), Path("r"), overrides), MODEL_SIZES[0], 64, 9
        )

    config = chosen("model.size=small", "train.epochs=3")
    assert config.model.emb_dim == 384 and config.train.epochs == 3 and config.train.steps is None
    # the default model is narrower than "small", and narrow models have four times the learning rate
    assert chosen().optim.peak_lr == pytest.approx(4 * config.optim.peak_lr)
    twice = chosen("model.image_size=64", "model.image_size=48").model  # the last value counts
    assert (twice.image_size, twice.patch_size) == (48, 4)
    assert chosen("train.global_batch=256").optim.peak_lr == pytest.approx(chosen().optim.peak_lr / 2)
    assert chosen("optim.peak_lr=1e-3").optim.peak_lr == 1e-3
    sizes = [[], ["model.image_size=128"], ["model.image_size=100"], ["model.patch_size=16"], ["model.patch_size=64"]]
    found = [chosen(*overrides).model for overrides in sizes]
    assert [(m.image_size, m.patch_size) for m in found] == [(40, 4), (128, 16), (100, 4), (32, 16), (64, 64)]


@pytest.mark.parametrize(
    ("paces", "size", "why"),
    [
        ({"tiny": 1e-3, "mini": 2e-3}, "mini", '"small" requires 10,000 samples or more'),
        (
            {"tiny": 1e-3, "mini": 1.0},
            "tiny",
            '"mini" is too slow: in the available time, it would see 3,322 images (3.3 epochs), but must see at least '
            "20,000 images and 20 epochs to be chosen",
        ),
    ],
)
def test_the_largest_model_size_that_fits_the_time_is_chosen(tmp_path, monkeypatch, paces, size, why):
    """The given paces, in seconds per sample, replace measured ones."""
    statistics = DatasetStatistics(1000, 100, 100, [0.5] * 3, [0.2] * 3, classes=0, vocab_size=0, text_length=8)
    widths = {128: "tiny", 192: "mini"}
    monkeypatch.setattr(
        size_and_length, "measure", lambda config, *_: ThroughputEstimate(paces[widths[config.model.emb_dim]], 8, 4)
    )
    session = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")))
    shards = Shards(["a.tar"], ["b.tar"], [])
    monkeypatch.setattr(size_and_length, "time", SimpleNamespace(monotonic=lambda: 50.0))
    found = size_and_length.choose(Inputs(statistics, shards, tmp_path), 1.0, session, 50.0)
    assert f'model: "{size}"' in found.lines[1] and why in found.lines[1]
    larger = size_and_length.choose(
        Inputs(statistics, shards, tmp_path, ["train.global_batch=256"]), 1.0, session, 50.0
    )
    assert larger.config.train.global_batch == 256
    for train in (found.config.train, larger.config.train):
        taken = train.steps * train.global_batch * paces[size]
        assert train.hours == pytest.approx((3600 - size_and_length._REPORT) / 3600, abs=1e-5)
        assert 0.85 * 3600 < taken <= 3600 or train.steps == automatic_settings.LONGEST * (1000 // train.global_batch)


def test_a_tenth_of_the_samples_but_at_most_5000_are_held_out():
    for samples, held_out in ((100, 10), (50_000, 5000), (100_000, 5000)):
        settings = source_shards._settings(SimpleNamespace(splits={"train": samples}), None, None, None)
        assert settings.held_out * samples == pytest.approx(held_out)


def small(classes=0, samples=1000):
    return DatasetStatistics(samples, 100, 100, [0.5] * 3, [0.2] * 3, classes=classes, vocab_size=0, text_length=8)


def planned(monkeypatch, statistics, hours, pace, overrides=(), spent=0.0, error=math.inf, update=0.0):
    """Return the plan for samples that take `pace` seconds each and updates that take `update` seconds, after `spent`
    seconds."""
    monkeypatch.setattr(size_and_length, "time", SimpleNamespace(monotonic=lambda: spent))
    monkeypatch.setattr(size_and_length, "measure", lambda *_: ThroughputEstimate(pace, 8, 24, error, update))
    monkeypatch.setattr(size_and_length, "missing_memory", lambda *_: "there is no memory")
    session = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")))
    return size_and_length.choose(
        Inputs(statistics, Shards(["a.tar"], ["b.tar"], []), Path("r"), overrides), hours, session, 0.0
    )


def test_the_hours_include_preparation_and_evaluation(monkeypatch):
    """The creation of shards and the measurements have taken a minute. Three models encode all samples once each."""
    found = planned(monkeypatch, small(classes=3), 0.5, 0.01, spent=60.0, error=0.05)
    training, after = 3600 * found.config.train.hours, 3 * 1100 * 0.01 + 3 * 1000 * 1e-7 * (2 * 6000 + 4500)
    assert 1800 - 60 - after - 30 < training < 1800 - 60 - after
    t = found.config.train
    evaluations = 1 + -(-t.steps // t.probe.every)
    taken = t.steps * t.global_batch * 0.01 + evaluations * (1100 + 100 * 2 / 3) * 0.01
    assert 0.85 * training < taken < training
    assert "at 100 ± 5 samples/s, measured over 24 steps" in found.lines[3]
    assert (
        "the number of steps is adjusted to the available time" in found.lines[2] and "done at about" in found.lines[3]
    )
    assert not found.warning and found.lines[3].endswith(" (--hours 0.5)")
    assert planned(monkeypatch, small(), 1e-7, 0.01).config.train.hours == 1e-5  # a limit of 0 would be invalid
    assert planned(monkeypatch, small(classes=3), 0.01, 0.01).lines[3].endswith(", later than --hours 0.01 allows")
    late = planned(monkeypatch, small(), 0.5, 0.01, spent=1800.0)  # the preparation alone took half an hour
    assert late.lines[3].endswith(", later than --hours 0.5 allows")
    continued = planned(monkeypatch, small(classes=3), 0.5, 0.01, ["model.init_from=start"], spent=60.0)
    less = 3600 * (t.hours - continued.config.train.hours)  # the initial weights are evaluated too
    assert 1100 * 0.01 < less < 1100 * 0.01 + 10


def test_the_time_for_regressions_grows_with_samples_and_classes_and_is_short_on_a_gpu():
    """For each of two networks, regressions with 4,000 features and at most 5,000 samples choose the pooling. A
    regression with the chosen pooling then has 2,000 features and uses all samples. The features without a network are
    1,500, and those of the run and HOG together are 3,000."""

    def seconds(samples, classes, **more):
        return size_and_length.Budget(small(classes, samples), True, 1.0, 0.0, **more).regressions()

    assert seconds(1000, 10) == pytest.approx(1e-7 * 10 * 1000 * (2 * 6000 + 4500))
    assert seconds(1000, 20) == 2 * seconds(1000, 10) == pytest.approx(100 * 2 * seconds(1000, 10, device="cuda"))
    assert seconds(50_000, 10) == pytest.approx(1e-6 * (2 * (5000 * 4000 + 50_000 * 2000) + 50_000 * 4500))
    assert seconds(1000, 10, models=4) - seconds(1000, 10) == pytest.approx(1e-6 * 1000 * 6000)


@pytest.mark.parametrize("pace", [1e-4, 1e-3, 1e-2])
def test_evaluations_use_a_small_part_of_the_time(monkeypatch, pace):
    t = planned(monkeypatch, small(classes=3), 0.1, pace).config.train
    each, between = size_and_length._START + 1100 * pace, (t.steps - 1) // t.eval_every if t.eval_every else 0
    assert between * each <= 0.12 * 360 and t.eval_every == t.probe.every
    assert between >= min(19, int(0.1 * 0.5 * 360 / (each + size_and_length._START + pace * 100)) - 1)


def test_a_training_length_set_by_the_user_is_kept(monkeypatch):
    for override in ("train.steps=12", "train.epochs=0.1", "train.hours=null"):
        found = planned(monkeypatch, small(), 0.01, 0.1, [override])
        assert found.config.train.hours is None and not found.warning
        assert not any("adjusted" in line for line in found.lines)
    assert planned(monkeypatch, small(), 0.01, 0.1, ["train.hours=2"]).config.train.hours == 2


@pytest.mark.parametrize(("held_out", "training"), [(0, "0:01:40"), (100, "0:01:51"), (2000, "0:02:22")])
def test_the_printed_time_includes_updates_and_evaluations(monkeypatch, held_out, training):
    """Each of 100 steps takes 0.1 s for its samples and 0.9 s for the update. There is an evaluation before the first
    step, and one after every 25 steps. An evaluation takes 1.5 s, and in addition 1/150 s for each held-out sample. It
    uses at most 1,024 held-out samples."""
    length = ["train.steps=100", "train.global_batch=10", "train.eval_every=25"]
    found = planned(monkeypatch, replace(small(), held_out=held_out), 0.5, 0.01, length, update=0.9)
    assert found.lines[3].startswith(f"time: {training} for training at 10 samples/s, measured over 24 steps")


def test_an_epoch_contains_each_view_of_a_sample(monkeypatch):
    found = planned(monkeypatch, small(), 0.5, 0.01, ["data.repeats=2", "train.epochs=3", "train.global_batch=10"])
    assert found.lines[2].startswith("length: 600 steps of 10 samples, 3.0 epochs")
    longest = planned(monkeypatch, small(), 9.0, 1e-6, ["data.repeats=2", "train.global_batch=10"])
    assert longest.config.train.steps == 800 * 200 and "800 epochs; the maximum is 800 epochs" in longest.lines[2]


def test_the_batch_is_halved_if_evaluations_leave_too_little_time_for_1000_steps(monkeypatch):
    """5,400 s are left for training, and 1,000 steps of 512 samples take 5,120 s, but the two probes at the beginning
    and at the end take 400 s."""
    train = planned(monkeypatch, small(classes=3, samples=20_000), 1.67, 0.01).config.train
    assert 3600 * train.hours > 5120 and train.steps >= 1000 and train.global_batch == 256
    # between the first step and the last, only losses are evaluated, because a probe would take 200 s
    assert train.probe.every is None and train.eval_every == train.steps // automatic_settings.EVALUATIONS


@pytest.mark.parametrize(("samples", "update"), [(9000, 0.0), (9000, 2.0), (40_000, 0.0)])
def test_a_run_that_is_too_short_is_reported_with_a_sufficient_length(monkeypatch, samples, update):
    short = planned(monkeypatch, small(samples=samples), 0.01, 0.01, update=update)
    steps = short.config.train.steps
    epochs = f"{steps / (samples // short.config.train.global_batch):.2g} epochs"
    expected = f"{steps} steps, {epochs}: the features will hardly differ"
    assert short.warning.startswith(expected) and steps < 100
    hours = float(short.warning.rpartition("at least ")[2])
    assert 3600 * hours > 0.01 * samples  # at least one epoch
    assert not planned(monkeypatch, small(samples=samples), hours, 0.01, update=update).warning
    assert planned(monkeypatch, small(samples=samples), 0.7 * hours, 0.01, update=update).warning
    assert (
        size_and_length._rounded_up(0.1234) == 0.13
        and size_and_length._rounded_up(12) == 12
        and size_and_length._rounded_up(1.201) == 1.3
    )


@pytest.mark.parametrize(("terminal", "answer", "starts"), [(True, "y", True), (True, "", False), (False, "", True)])
def test_a_run_that_is_too_short_requires_confirmation(monkeypatch, tmp_path, capsys, terminal, answer, starts):
    """A user at a terminal is asked; otherwise, a note is printed."""
    photos = make_pictures(tmp_path / "photos", each=2, captions=False)
    config = settings(Inputs(small(), Shards(["a.tar"], [], []), tmp_path / "run"), MODEL_SIZES[0], 1, 9)
    monkeypatch.setattr(stages, "choose", lambda *_: size_and_length.Plan(config, [], "9 steps: give more"))
    monkeypatch.setattr(stages, "pre_train", lambda *_, **__: 0.0)
    monkeypatch.setattr(stages, "status", lambda _: ("stopped", ""))
    stdin = StringIO(f"{answer}\n")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    if starts:
        assert not pretrain(photos, tmp_path / "run").finished
    else:
        with pytest.raises(UserError, match="the run was not started; increase --hours"):
            pretrain(photos, tmp_path / "run")
    assert (tmp_path / "run/config.json").exists() == starts
    assert "warning: 9 steps: give more" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_takes_about_the_given_hours(tmp_path):
    """The run ends in time regardless of the load of the machine, and prints its number of steps."""
    photos = make_pictures(tmp_path / "photos", each=40, captions=False)
    run, began = tmp_path / "run", time.monotonic()
    assert pretrain(photos, run, hours=0.004, overrides=["data.workers=0", "train.probe=null"]).finished
    took = time.monotonic() - began
    config, info = load_config(run / "config.json"), checkpoint.read_info(checkpoint.locate(run))
    assert 0 < config.train.hours < 0.004 and took < 20 * 3600 * 0.004
    total = info.changes[-1][1] if info.changes else config.train.steps
    assert status(run) == ("finished", f"finished at step {info.step:,} of {total:,}") and info.step == total
    assert took > 0.3 * 3600 * 0.004 or total == 800 * (108 // config.train.global_batch)
