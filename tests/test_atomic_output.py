"""A file is completely written to disk before it replaces another one, and the replaced file is never lost."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import METRICS_FILE
from m3ae_fast.base.output_folder import CARD_FILE, MODEL_FILE, output_folder, write_tensors
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.checkpoint import state_files
from m3ae_fast.cli.shards import main as make_data
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.manifest import rows_of, write
from m3ae_fast.engine.fragments import cut
from m3ae_fast.training.metrics_log import RunLog
from tests.helpers.checkpoints import save, save_cut
from tests.helpers.shards import members, picture, write_tar
from tests.helpers.trainer import CLIPART


def _file(folder):
    for text in ("old", "new"):
        with atomic_write(folder / "a.txt") as partial:
            partial.write_text(text)


def _model(folder, text="new"):
    with output_folder(folder / "out") as partial:
        write_tensors(partial / MODEL_FILE, {"a": torch.zeros(2)})
        (partial / CARD_FILE).write_text(text)


def _checkpoint(folder):
    save(folder, {"model/a": torch.zeros(2)}, checkpoint.Info(1, 16, 0, {}, {}), keep=1)


def _parts(folder):
    save_cut(folder, {"model/a": torch.zeros(5)}, 2, step=1)


def _manifest(folder):
    write(folder / "a.npy", rows_of(["a.tar"], [(1, 2, 0)]))


def _metrics(folder):
    for start in (0, 1):
        with RunLog(folder, start, 9, loggers=()) as log:
            log.log(start + 1, {"loss": 1.0})


def _index(folder):
    open_corpus([SourceConfig(shards=write_tar(folder / "a.tar", members(range(2))))], ShardStore(folder / "cache"))


def _copy(folder):
    ShardStore(folder / "cache").path(f"pipe:cat {write_tar(folder / 'a.tar', members(range(2)))}")


def _shards(folder):
    (folder / "in").mkdir()
    (folder / "in/a.jpg").write_bytes(picture(1))
    make_data(["make", str(folder / "in"), "--out", str(folder / "out"), "--workers", "1"])


@pytest.fixture
def calls(monkeypatch):
    """Record the fsyncs as (name, path), and the replacements and renames with both paths, in order."""
    made = []
    fsync = os.fsync

    def noting(name, function):
        def call(a, b, **options):
            made.append((name, Path(a), Path(b)))
            function(a, b, **options)

        return call

    def sync(fd):
        made.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}"))))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    return made


@pytest.mark.parametrize(
    "write, name",
    [
        (_file, "a.txt"),
        (_model, "out"),
        (_checkpoint, "checkpoints/step-00000001"),
        (_parts, "checkpoints/step-00000001"),
        (_manifest, "a.npy"),
        (_metrics, METRICS_FILE),
        (_index, "a.tar.index"),
        (_copy, "cache/shards/*"),
        (_shards, "out/*.tar"),
    ],
)
def test_contents_are_synced_to_disk_before_the_rename_and_the_folder_after_it(tmp_path, calls, write, name):
    write(tmp_path)
    (found,) = tmp_path.glob(name)
    last = max(i for i, call in enumerate(calls) if call[0] != "sync" and call[-1] == found)
    _, partial, _ = calls[last]
    inside = {partial / path.name for path in found.iterdir()} if found.is_dir() else set()
    assert inside | {partial} <= {path for kind, path, *_ in calls[:last] if kind == "sync"}
    assert [("sync", found.parent)] == calls[last + 1 : last + 2]


@pytest.mark.parametrize("world", [1, 3])
def test_a_rank_syncs_its_part_on_its_own_node(tmp_path, calls, world):
    """The rank syncs its part before it reports the end of writing, because rank 0, which renames the checkpoint, may
    be on another node."""
    part = state_files.write_part(tmp_path, cut({"model/a": torch.ones(6)}, world - 1, world), world - 1, world)
    file = tmp_path / state_files.part_files(world)[-1]
    assert ("sync", file) in calls and part == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def exported(tmp_path):
    _model(tmp_path, "old")
    return tmp_path / "out"


def _refusing(monkeypatch, *refused):
    """Let the renames with these numbers, counted from 1, fail."""
    count = iter(range(1, 100))

    def wrap(function):
        def call(a, b, **options):
            if next(count) in refused:
                raise OSError(5, "Input/output error")
            function(a, b, **options)

        return call

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("refused", [1, 2])
def test_an_output_that_cannot_be_renamed_leaves_the_old_one_unchanged(tmp_path, monkeypatch, exported, refused):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    _refusing(monkeypatch, refused)
    with pytest.raises(UserError, match=r"out: cannot be written \(Input/output error\)"):
        _model(tmp_path)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_that_cannot_be_restored_is_kept_and_named(tmp_path, monkeypatch, exported):
    _refusing(monkeypatch, 2, 3)
    with pytest.raises(UserError, match="can neither be replaced nor restored") as caught:
        _model(tmp_path)
    (kept,) = tmp_path.iterdir()
    assert str(kept) in str(caught.value) and (kept / CARD_FILE).read_text() == "old"


def test_an_output_written_concurrently_by_another_process_is_not_lost(tmp_path, monkeypatch, exported):
    """After this process has renamed the old output, another process writes its own output there."""
    rename = os.rename

    def late(a, b, **options):
        rename(a, b, **options)
        if Path(a) == exported:
            exported.mkdir()
            (exported / "theirs").touch()

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(UserError, match="can neither be replaced nor restored"):
        _model(tmp_path)
    kept = [path for path in tmp_path.iterdir() if path != exported]
    assert [(path / CARD_FILE).read_text() for path in kept] == ["old"] and (exported / "theirs").exists()


def test_two_concurrent_writers_of_a_file_do_not_interfere(tmp_path):
    """The complete file of the writer that ends last remains, even if the other one began later."""
    with atomic_write(tmp_path / "a.txt") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "a.txt") as second:
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_two_concurrent_writers_of_a_folder_do_not_interfere(tmp_path):
    with output_folder(tmp_path / "out") as partial:
        _model(tmp_path)
        write_tensors(partial / MODEL_FILE, {"a": torch.zeros(2)})
        (partial / CARD_FILE).write_text("first")
    assert (tmp_path / "out" / CARD_FILE).read_text() == "first" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write, name", [(_file, "a.txt"), (_model, "out")])
def test_leftovers_of_a_killed_process_are_removed(tmp_path, write, name):
    child = os.fork()
    if not child:
        with atomic_write(tmp_path / "a.txt"), output_folder(tmp_path / "out") as partial:
            (partial / "part").touch()
            os._exit(0)  # like a kill, this skips all clean-up
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    write(tmp_path)
    assert name in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 2


def test_names_with_glob_characters_are_taken_literally(tmp_path):
    """A writer of "out[1]" does not remove the leftovers of "out1", and vice versa."""
    left = [tmp_path / f".writing-{name}-0123abcd" for name in ("out[1]", "out1")]
    for folder in left:
        folder.mkdir()
    with output_folder(tmp_path / "out[1]") as partial:
        write_tensors(partial / MODEL_FILE, {"a": torch.zeros(2)})
    assert not left[0].exists() and left[1].exists() and (tmp_path / "out[1]" / MODEL_FILE).exists()


def test_an_output_given_as_a_link_replaces_the_target_of_the_link(tmp_path, monkeypatch, exported):
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with output_folder("link") as partial:
        monkeypatch.chdir(tmp_path / "elsewhere")  # a relative path refers to the folder where the program started
        write_tensors(partial / MODEL_FILE, {"a": torch.zeros(2)})
        (partial / CARD_FILE).write_text("new")
    assert (tmp_path / "link").is_symlink() and (exported / CARD_FILE).read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_an_ordinary_error():
    """The library raises a plain Exception, which programs would show as a bug."""
    tokenizer = load_tokenizer(str(CLIPART / "tokenizer.json"), 16)
    with pytest.raises(OSError, match="No space left on device"):
        tokenizer.save(Path("/dev/full"))


def test_a_file_in_place_of_the_folder_of_an_output_is_named(tmp_path):
    """The system's own message, "File exists", would seem to be about the output."""
    (tmp_path / "a").write_text("mine")
    with (
        pytest.raises(UserError, match=rf"a/b/c.txt: cannot be written \({tmp_path}/a is a file\); choose another"),
        atomic_write(tmp_path / "a/b/c.txt"),
    ):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_a_link_named_like_an_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.txt.0.partial").symlink_to(tmp_path / "precious")
    _file(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "a.txt").read_text() == "new"
