"""Work in addition to the training steps: saves in the background, garbage collection, shared memory, and checks at the
start."""

import gc
import json
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from m3ae_fast import checkpoint
from m3ae_fast.base import hardware
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.data import batches_ahead
from m3ae_fast.process import garbage_collection
from m3ae_fast.process.background import Background
from m3ae_fast.process.garbage_collection import GarbageCollection
from m3ae_fast.training import pretraining_task
from tests.helpers.pretraining_task import task_without_engine
from tests.helpers.ranks import fork_ranks


def test_a_background_error_is_visible_at_once_and_raised_once():
    background, begun = Background(), threading.Event()

    def work() -> None:
        begun.wait(5)
        raise UserError("the disk is full")

    background.start(work)
    assert background.busy and not background.failed()
    begun.set()
    background._idle.wait()
    assert background.failed() and not background.busy
    with pytest.raises(UserError, match="the disk is full"):
        background.wait()
    assert not background.failed()
    background.wait()


def test_background_work_does_not_start_a_new_thread(monkeypatch):
    background, done = Background(), []
    monkeypatch.setattr(threading.Thread, "start", None)
    for number in range(2):
        background.start(lambda number=number: done.append(number))
        background.wait()
    assert done == [0, 1]


def test_background_work_starts_only_after_the_previous_error_was_raised():
    background, done, go = Background(), [], threading.Event()

    def fail() -> None:
        go.wait(5)
        raise UserError("the disk is full")

    background.start(fail)
    for _ in range(2):  # while the work is running, and after it has failed
        with pytest.raises(AssertionError):
            background.start(lambda: done.append(1))
        go.set()
        background._idle.wait()
    with pytest.raises(UserError, match="the disk is full"):
        background.wait()
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [2]


class Panic(BaseException):
    """An exception like the panic of a library in Rust."""


def test_background_errors_that_are_not_exceptions_are_raised():
    background = Background()

    def work() -> None:
        raise Panic

    for _ in range(2):
        background.start(work)
        with pytest.raises(Panic):
            background.wait()


@pytest.mark.parametrize("error", [None, UserError, RuntimeError, KeyboardInterrupt])
def test_the_last_background_work_is_awaited_at_the_end(error):
    """The last work is not awaited if the user interrupts the run."""
    done, go = [], threading.Event()
    timer = threading.Timer(0.3, go.set)
    timer.start()

    def work() -> None:
        go.wait(5)
        done.append(1)

    background = Background()

    def run() -> None:
        with background:
            background.start(work)
            if error:
                raise error("enough")

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert done == ([] if error is KeyboardInterrupt else [1])
    # a UserError is raised on all ranks, so no rank has to end the others
    assert background.leaving.is_set() == (error in (KeyboardInterrupt, RuntimeError))
    go.set()
    timer.join()


@pytest.mark.parametrize("error", [None, ValueError])
def test_an_error_of_the_last_background_work_is_raised_at_the_end_unless_another_error_ends_the_run(error):
    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(error or UserError, match="enough" if error else "the disk is full"), Background() as background:
        background.start(fail)
        if error:
            raise error("enough")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_fails_in_the_background_stops_the_run(trainer, ranks):
    """After the first save, a file replaces the checkpoint folder."""
    options = ["--set", "train.steps=2000", "--set", "train.save_every=2", "--set", "train.keep=1"]
    processes = fork_ranks("m3ae_fast.train", trainer.arguments("run", *options), ranks, trainer.log("run"))
    folder = trainer.folder / "run/checkpoints"
    while processes[0].is_alive() and not checkpoint.saved_steps(trainer.folder / "run"):
        time.sleep(0.01)
    folder.rename(trainer.folder / "away")
    folder.write_text("in the way")
    for process in processes:
        process.join(120)
    out = trainer.log("run").read_text()
    assert {process.exitcode for process in processes} == {2} and "Traceback" not in out
    assert "cannot be written" in out and out.count("error") <= 2
    steps = [json.loads(line)["step"] for line in (trainer.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) < 200


def test_garbage_is_collected_in_the_same_steps_on_all_ranks(monkeypatch):
    monkeypatch.setattr(garbage_collection, "EVERY", 20)
    collected = []
    with GarbageCollection() as collection:
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
        for step in range(1, 21):
            collection.after_step(step)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert collected == [1] * 9 + [2]
    gc.disable()
    try:
        with GarbageCollection():
            pass
        assert not gc.isenabled()  # still disabled, as before
    finally:
        gc.enable()


GEOMETRY = Geometry(256, 16, 3, 64)


@pytest.mark.parametrize("width", [256, 512])
def test_a_packed_batch_does_not_exceed_its_estimated_size(width):
    """Images are square, or native and of the largest size."""
    import torch

    from m3ae_fast.batch import Sample, pack
    from m3ae_fast.images.patch_grid import Native

    geometry = GEOMETRY if width == 256 else replace(GEOMETRY, native=Native(16, 1, 512, 32, "absolute"))
    samples = []
    for i in range(3):
        sample = Sample(str(i), torch.zeros(3, 256, width, dtype=torch.uint8), torch.arange(width) % 4 > 0)
        sample.tokens, sample.text_mask = torch.zeros(64, dtype=torch.int64), torch.arange(64) % 4 > 0
        samples.append(sample)
    (joined, _, _, others) = pack(samples, geometry).__reduce__()[1]
    size = joined.nbytes + others["images"].nbytes
    assert 0.9 * batches_ahead.batch_bytes(geometry, 3) < size <= batches_ahead.batch_bytes(geometry, 3)


def _free(monkeypatch, size):
    """Replace os.statvfs, so that `size` bytes of shared memory seem free, in blocks of 100 bytes."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=size / 100, f_frsize=100))


@pytest.mark.parametrize(
    ("free", "ranks", "workers", "prefetch"),
    [(1e12, 1, 1, 4), (1e12, 8, 16, 4), (4e9, 1, 8, 4), (2e9, 1, 8, 1), (4e9, 2, 8, 1)],
)
def test_prefetched_batches_fit_into_shared_memory(monkeypatch, free, ranks, workers, prefetch):
    _free(monkeypatch, free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    size = 80_000_000
    got = batches_ahead.fitting_prefetch(workers, size)
    assert got == prefetch
    assert got == 1 or (got + 1) * workers * size <= free / ranks


def test_too_little_shared_memory_is_reported_before_a_worker_is_killed(monkeypatch):
    _free(monkeypatch, 64e6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"has 51 MB available per rank, but the batches of 4 workers.* 640 MB.*--shm"):
        batches_ahead.fitting_prefetch(4, 80_000_000)
    assert batches_ahead.most_workers(80_000_000) == 1 and batches_ahead.most_workers(1_000_000) == 25


def test_shared_memory_of_unknown_size_is_not_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(batches_ahead, "SHM", tmp_path / "none")
    assert batches_ahead.fitting_prefetch(16, 80_000_000) == 4


def test_missing_build_requirements_of_triton_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [part.split()[0] for part in hardware.missing_for_triton()] == ["a", "Python.h"]
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    assert hardware.missing_for_triton() == []


@pytest.mark.parametrize("held_out", [True, False])
def test_damaged_shards_of_training_and_held_out_samples_are_named(monkeypatch, held_out):
    reported = []
    attention = SimpleNamespace(choose=print, use_kernels=lambda kernels: None, describe=lambda: "")
    monkeypatch.setattr(pretraining_task, "RunAttention", lambda *_: attention)
    config = SimpleNamespace(model=None, masking=None, train=SimpleNamespace(precision="fp32"))
    val = SimpleNamespace(damaged=["val"]) if held_out else None
    data = SimpleNamespace(train=SimpleNamespace(damaged=["train"]), val=val)
    task = task_without_engine(config, data)
    trainer = SimpleNamespace(
        ranks=SimpleNamespace(device=None, is_main=False, broadcast=lambda _: ({}, {}), from_main=lambda value: value),
        bad=SimpleNamespace(report=lambda items, log: reported.extend(items)),
        share=SimpleNamespace(micro_batch=1),
    )
    assert task.describe(trainer) == []  # this is not the main rank
    assert reported == (["train", "val"] if held_out else ["train"])
