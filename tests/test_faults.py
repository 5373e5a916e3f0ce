"""A fault on one rank ends all ranks at once, and the error of this rank is the one that is shown."""

import json
import os
import signal
import time
from importlib import import_module

import pytest

from m3ae_fast import checkpoint
from m3ae_fast.training.run_state import RECORD_FILE
from tests.helpers.faulty import PROGRAMS
from tests.helpers.labelled import labelled_tar, tiny_run
from tests.helpers.ranks import fork_ranks, run_ranks
from tests.helpers.trainer import Trainer, zero

pytestmark = pytest.mark.slow

SOON_S = 90  # far below the timeout of a stall, 300 s; an idle machine takes a few seconds


def main(argv):
    """Run the program `argv[0]`, a module. Each further argument contains the options of a rank."""
    program, *options = argv
    return import_module(program).main(options[int(os.environ["RANK"])].split())


@pytest.fixture
def faulty(tmp_path):
    """Return a function that runs the trainer, `embed` or `evaluate` on 2 ranks with a fault and returns the exit codes
    and the output. A rank that hangs receives SIGTERM."""
    trainer = Trainer(tmp_path)

    def run(place, rank, error, *options):
        if place not in PROGRAMS:
            options = trainer.arguments("run", "--set", "train.save_every=2", "--set", "data.val=[]", *options)
        log = tmp_path / "log"
        processes = fork_ranks("tests.helpers.faulty", [place, str(rank), error, *options], 2, log)
        until = time.monotonic() + SOON_S
        if error == "hang":
            while not (log.exists() and "hanging" in log.read_text()):
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            os.kill(processes[rank].pid, signal.SIGTERM)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes, log.read_text()

    return run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("copy", "MemoryError", "rank {rank} does not have enough memory to copy its part (no room for the copy)"),
        ("write", "full", "cannot be written (rank {rank}: [Errno 28] No space left on device)"),
        ("write", "MemoryError", "cannot be written (rank {rank}: MemoryError: no room for the copy)"),
    ],
    ids=["copy-memory", "write-full", "write-memory"],
)
def test_an_os_error_on_one_rank_is_reported_in_one_line(faulty, tmp_path, place, rank, error, message):
    codes, out = faulty(place, rank, error)
    assert codes == [2, 2], out
    assert out.count("error: ") == 1 and message.format(rank=rank) in out and "Traceback" not in out
    assert "the earlier checkpoints are intact" in out and checkpoint.saved_steps(tmp_path / "run") == []
    record = json.loads((tmp_path / "run" / RECORD_FILE).read_text())
    assert record["state"] == "failed" and message.format(rank=rank) in record["reason"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place, error", [("copy", "KeyError"), ("copy", "EBADF"), ("write", "KeyError")])
def test_a_bug_on_one_rank_shows_its_traceback(faulty, place, rank, error):
    codes, out = faulty(place, rank, error)
    assert codes[rank] == 1 and codes[1 - rank] == 2, out
    assert "in injected_fault" in out and out.count("Traceback") == 1
    assert ("KeyError: 'a bug'" if error == "KeyError" else "OSError: [Errno 9] Bad file descriptor") in out


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("rename", "full", "cannot be written ([Errno 28] No space left on device)"),
        ("table", "full", "cannot be written ([Errno 28] No space left on device)"),
        ("log", "full", "cannot be written to (No space left on device)"),
    ],
    ids=["rename", "table", "log"],
)
def test_an_os_error_on_rank_0_is_reported_in_one_line(faulty, place, error, message):
    codes, out = faulty(place, 0, error)
    assert codes == [2, 2], out
    assert out.count("error: ") == 1 and message in out and "Traceback" not in out


@pytest.mark.parametrize("place", ["rename", "pictures"])
def test_a_bug_on_rank_0_shows_its_traceback(faulty, place):
    codes, out = faulty(place, 0, "KeyError", "--set", "train.pictures=2")
    assert codes == [1, 2], out
    assert "in injected_fault" in out and "KeyError: 'a bug'" in out


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ["KeyError", "UserError"])
def test_an_error_in_a_loader_worker_of_one_rank_is_the_reported_error(faulty, rank, error):
    codes, out = faulty("loader", rank, error)
    if error == "KeyError":
        assert codes[rank] == 1 and codes[1 - rank] == 75, out  # the healthy rank knows only that the other has ended
        assert "in injected_fault" in out and "KeyError: 'a bug'" in out
    else:
        assert codes[rank] == 2 and "error: a.tar: a mistake\n" in out and "Traceback" not in out, out
        assert codes[1 - rank] in ((2,) if rank == 1 else (2, 75)), out  # rank 0 hosts the TCP store, which may be gone


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ["KeyError", "UserError"])
def test_an_error_on_one_rank_ends_embed_on_all_ranks(faulty, tmp_path, rank, error):
    codes, out = faulty("embed", rank, error, *_options(tmp_path, "embed"))
    if error == "KeyError":
        assert codes[rank] == 1 and codes[1 - rank] == 75, out
        assert "in injected_fault" in out and out.count("Traceback") == 1
    else:
        assert codes == [2, 2] and out.count("error: ") == 1 and "error: a.tar: a mistake\n" in out, out
        assert "Traceback" not in out
    assert not (tmp_path / "out.npz").exists()


def _options(folder, program):
    """Return the arguments of `embed` or of `evaluate`."""
    shard, model = str(labelled_tar(folder / "a.tar", range(12))), str(tiny_run(folder / "model"))
    common = ["--out", str(folder / "out.npz"), "--device", "cpu", "--set", "data.workers=0"]
    if program == "embed":
        return [model, shard, *common]
    return ["knn", model, "--train", shard, "--val", shard, "--no-baselines", *common]


AGAIN = "running the same command again starts over"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("program", ["embed", "evaluate"])
def test_programs_without_checkpoints_end_with_code_0_if_one_rank_is_stopped(faulty, tmp_path, program, rank):
    codes, out = faulty(program, rank, "hang", *_options(tmp_path, program))
    assert codes == [0, 0] and out.count("stopped") == 1 and f"stopped (SIGTERM); {AGAIN}\n" in out, out
    assert not (tmp_path / "out.npz").is_file() and not (tmp_path / "out.npz/result.json").exists()


@pytest.mark.parametrize("program", ["embed", "evaluate"])
def test_the_loss_of_a_rank_of_a_program_without_checkpoints_is_reported_without_advice_to_resume(
    faulty, tmp_path, program
):
    codes, out = faulty(program, 1, "SIGKILL", *_options(tmp_path, program))
    assert codes == [75, -signal.SIGKILL], out
    assert out.count("error: ") == 1 and f"unless it was killed or its node was lost. {AGAIN}\n" in out, out


@pytest.mark.parametrize("place", ["copy", "write", "rename"])
def test_errors_with_zero_stages_are_reported_as_with_plain_torch(faulty, place):
    codes, out = faulty(place, 1 if place != "rename" else 0, "full", *zero(2))
    assert codes == [2, 2], out
    assert out.count("error: ") == 1 and "[Errno 28] No space left on device" in out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_during_the_last_save_ends_the_other_at_once(faulty, rank):
    """The other rank reports the killed rank, and exits with the code that requests a restart."""
    codes, out = faulty("write", rank, "SIGKILL", "--set", "train.save_every=6")
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 75), out
    who = "rank 0" if rank == 0 else "another rank"
    assert f"error: {who} exited; see its output for the reason, unless it was killed" in out
    assert out.count("error: ") == 1 and "Traceback" not in out


TRAIN = "--config {config} --set run.dir=run"
PROBE = "knn a --train a.tar --val b.tar --out a"
EMBED = "a a.tar --out a.npz"


@pytest.mark.parametrize(
    ("program", "first", "other", "message"),
    [
        (
            "train",
            TRAIN,
            f"{TRAIN} --set train.steps=9",
            "set=['run.dir=run', 'train.steps=9'], but rank 0 with set=['run.dir=run']",
        ),
        (
            "train",
            f"{TRAIN} --local_rank 0",
            f"{TRAIN} --local_rank 1 --resume auto",
            "resume='auto', but rank 0 with resume='no'",
        ),
        ("cli.evaluate", PROBE, PROBE.replace("knn a", "knn b"), "model='b', but rank 0 with model='a'"),
        ("cli.evaluate", PROBE, f"{PROBE} --set knn.k=3", "overrides=['knn.k=3'], but rank 0 with overrides=()"),
        ("cli.embed", EMBED, f"b{EMBED[1:]}", "model='b', but rank 0 with model='a'"),
        ("cli.embed", EMBED, f"{EMBED} --modality text", "modality='text', but rank 0 with modality='image'"),
    ],
)
def test_options_that_differ_between_ranks_are_an_error(tmp_path, monkeypatch, program, first, other, message):
    """Only --local_rank, which a launcher may pass to each rank, may differ."""
    monkeypatch.chdir(tmp_path)
    config = Trainer(tmp_path).config
    options = [each.format(config=config) for each in (first, other)]
    before = sorted(tmp_path.iterdir())
    code, out = run_ranks("tests.test_faults", [f"m3ae_fast.{program}", *options], 2, tmp_path.with_suffix(".log"))
    assert code == 2, out
    assert out == f"error: rank 1 was started with {message}: start all ranks with the same options\n"
    assert sorted(tmp_path.iterdir()) == before
