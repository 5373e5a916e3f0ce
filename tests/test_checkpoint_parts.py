"""Checkpoints of which each rank writes a part are complete or absent, and can be loaded on any number of ranks."""

import itertools
import json
import os
import re
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import resuming, state_files, writing
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.checkpoint.saver import Saver
from m3ae_fast.checkpoint.state_files import TABLE_FILE, part_files
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.engine.fragments import Fragment, cut, whole
from m3ae_fast.engine.schedule import Change
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.training.trainer import Trainer
from m3ae_fast.weights.converting import convert
from m3ae_fast.weights.open_model import SavedRun, run_weights
from tests.helpers import threads
from tests.helpers.checkpoints import save, save_cut, save_parts
from tests.helpers.labelled import tiny_run
from tests.helpers.ranks import fork_ranks, run_ranks

MODULE = "tests.helpers.checkpoint_cases"
STATE = {"model/a": torch.arange(35.0).view(5, 7), "model/b": -torch.arange(3.0), "exp_avg/a": torch.ones(5, 7)}


def _ranks(what, folder, ranks):
    code, out = run_ranks(MODULE, [what, str(folder)], ranks, folder / f"{what}-{ranks}.log")
    assert code == 0, out[-3000:]


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_is_loaded_bitwise_by_any_number_of_ranks_in_any_stage(tmp_path):
    """Checkpoints of plain torch and of ZeRO 0 to 3 are loaded. No rank copies more than 1.3 times its share."""
    _ranks("save", tmp_path, 4)
    for zero in ("None", "3"):
        (path,) = checkpoint.saved_steps(tmp_path / zero)
        assert sorted(p.name for p in path.iterdir()) == [*part_files(4), "state.json", TABLE_FILE]
    for ranks in (1, 3, 5):
        _ranks("load", tmp_path, ranks)


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_is_loaded_by_several(tmp_path):
    _ranks("save", tmp_path, 1)
    saved = tmp_path / "3/checkpoints/step-00000002"
    assert sorted(path.name for path in saved.iterdir()) == ["state.json", state_files.STATE_FILE, TABLE_FILE]
    _ranks("load", tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, where", [(2, "save_file"), (1, "sync_to_disk"), (0, "write_table"), (0, "put_in_place")]
)
def test_a_rank_killed_during_a_save_leaves_the_previous_checkpoint(tmp_path, rank, where):
    processes = fork_ranks(MODULE, ["die", str(tmp_path), str(rank), where], 4, tmp_path / "log")
    processes[rank].join(60)
    for process in processes:
        process.kill()
        process.join(60)
    (path,) = checkpoint.saved_steps(tmp_path)
    assert resuming.find(tmp_path, "auto") == path
    assert torch.equal(checkpoint.open_state(path).whole("model/w"), torch.arange(1000.0) + 1)
    left = os.listdir(tmp_path / "checkpoints")
    assert len(left) == 2 and left != [path.name]  # the folder that the failed save had begun
    save_cut(tmp_path, STATE, 2, step=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("world", [1, 2, 5, 90])
def test_concatenated_tensors_are_split_into_equal_parts(world):
    pieces = [cut(STATE, rank, world) for rank in range(world)]
    sizes = [sum(len(piece.data) for piece in part.values()) for part in pieces]
    assert sum(sizes) == 73 and max(sizes) == -(-73 // world)
    for name, tensor in STATE.items():
        assert torch.equal(torch.cat([part[name].data for part in pieces]), tensor.flatten())
        assert {part[name].shape for part in pieces} == {tuple(tensor.shape)}


@pytest.mark.parametrize("world", [1, 2, 5, 80])  # some of the 80 ranks have nothing to write
def test_any_elements_of_a_tensor_are_read_from_the_files_that_contain_them(tmp_path, world):
    state = checkpoint.open_state(save_cut(tmp_path, STATE, world))
    assert state.shapes == {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    for name, tensor in STATE.items():
        assert torch.equal(state.whole(name), tensor)
        for start in range(0, tensor.numel() + 1, 3):
            for stop in range(start, tensor.numel() + 1, 2):
                assert torch.equal(state.read(name, start, stop - start), tensor.flatten()[start:stop])


def test_the_slices_of_a_tensor_may_be_assigned_to_ranks_in_any_order(tmp_path):
    path, *_ = save_parts(tmp_path, [cut(STATE, rank, 3) for rank in (2, 0, 1)])
    state = checkpoint.open_state(path)
    for name, tensor in STATE.items():
        assert torch.equal(state.whole(name), tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("world", [1, 2, 5, 80])
def test_torch_distributed_checkpoint_reads_checkpoints_of_several_ranks(tmp_path, world):
    path = save_cut(tmp_path, STATE, world)
    pieces = checkpoint.state_files.read_table(path).pieces
    found = {
        name: torch.zeros(tensor.shape if len(pieces[name]) == 1 else tensor.numel()) for name, tensor in STATE.items()
    }
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    for name, tensor in STATE.items():
        assert torch.equal(found[name].view(tensor.shape), tensor)


def test_a_checkpoint_of_one_rank_is_one_safetensors_file(tmp_path):
    path = save(tmp_path, STATE, checkpoint.Info(1, 0, 42, {}, {}))
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors", TABLE_FILE]
    for folder in (path, save_cut(tmp_path, STATE, 2, step=2)):  # all its files have the same permissions
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    found = load_file(path / "state.safetensors")
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    assert torch.equal(checkpoint.open_state(path).read("model/a", 3, 9), STATE["model/a"].flatten()[3:12])


def test_the_export_of_a_run_does_not_depend_on_its_number_of_ranks(tmp_path):
    for ranks in (1, 3):
        torch.manual_seed(0)
        run = tiny_run(tmp_path / str(ranks), ranks=ranks)
        convert(run, tmp_path / f"out-{ranks}")
    one, three = (load_file(tmp_path / f"out-{ranks}/model.safetensors") for ranks in (1, 3))
    assert one.keys() == three.keys() and all(torch.equal(three[name], tensor) for name, tensor in one.items())


def test_averaged_weights_and_buffers_are_read_from_a_checkpoint_of_several_ranks(tmp_path):
    state = {"model/a": torch.zeros(9), "model/fixed": torch.ones(2), "ema/a": torch.arange(9.0)}
    path = save_cut(tmp_path, state, 4)
    for average, expected in ((True, state["ema/a"]), (False, state["model/a"])):
        found = checkpoint.read_weights(path, average=average)
        assert found.keys() == {"a", "fixed"} and torch.equal(found["a"], expected)
        sizes = ModelConfig.model_validate({"size": "small", "vocab_size": 0})
        run = SavedRun(path, None, sizes, LossConfig(), None, ema=0.9)
        assert ("the average of its weights" in run_weights(run, average=average).kind) == average


def _parts(world=3):
    return [cut(STATE, rank, world) for rank in range(world)]


def test_missing_and_duplicate_elements_are_detected_on_every_rank(tmp_path):
    """A rank that contributes too few or too many elements does not notice this by itself."""
    less, more, other = _parts(), _parts(), _parts()
    less[1]["model/a"] = less[1]["model/a"]._replace(data=less[1]["model/a"].data[:-2])
    more[2]["model/b"] = whole(STATE["model/b"])
    other[0]["model/b"] = Fragment(torch.zeros(3), 1, (3,))
    for found, words in (
        (less, "no rank's part contains elements 33 to 34 of model/a"),
        (more, "more than one rank"),
        (other, "model/b"),
    ):
        texts = save_parts(tmp_path, found)
        assert len(set(texts)) == 1 and words in texts[0], texts
        assert os.listdir(tmp_path / "checkpoints") == []


def test_the_table_is_computed_once_for_equal_splits(tmp_path, monkeypatch):
    made, tabulate = [], state_files.tabulate
    monkeypatch.setattr(state_files, "tabulate", lambda *args: made.append(args[0].name) or tabulate(*args))
    state_files._table.cache_clear()
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    paths = [save_cut(tmp_path, state, 3, step) for step, state in enumerate((STATE, other))]
    assert len(made) == 1
    assert all(torch.equal(checkpoint.open_state(paths[1]).whole(name), tensor) for name, tensor in other.items())
    for number, state in enumerate((STATE | {"model/b": torch.zeros(4)}, {"model/a": torch.zeros(7, 5)}), 2):
        path = save_cut(tmp_path, state, 3, number)
        assert len(made) == number
        assert checkpoint.open_state(path).shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_non_finite_values_on_one_rank_are_reported_on_all_ranks_and_not_written(tmp_path):
    found = _parts()
    found[2]["exp_avg/a"].data[-1] = torch.nan
    try:
        (text,) = set(save_parts(tmp_path, found))
    finally:
        STATE["exp_avg/a"].fill_(1)
    assert "not written, because exp_avg/a is not finite; the earlier checkpoints are intact" in text
    assert checkpoint.saved_steps(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no room")])
def test_a_disk_error_on_one_rank_is_reported_on_all_ranks(tmp_path, monkeypatch, error):
    first, write = save_cut(tmp_path, STATE, 3), state_files.save_file

    def refuse(tensors, file, *rest):
        if part_files(3)[1] in str(file):
            raise error
        write(tensors, file, *rest)

    monkeypatch.setattr(state_files, "save_file", refuse)
    (text,) = set(save_parts(tmp_path, _parts(), step=2))
    assert "cannot be written (rank 1: " in text and str(error) in text and "earlier checkpoints are intact" in text
    assert os.listdir(tmp_path / "checkpoints") == [first.name]


def test_a_folder_that_nodes_do_not_share_is_reported(tmp_path, monkeypatch):
    """Each rank's file is on the disk of its own node."""
    write = state_files.save_file

    def elsewhere(tensors, file, *rest):
        write(tensors, tmp_path / "elsewhere" if file.name == part_files(3)[2] else file, *rest)

    (tmp_path / "elsewhere").touch()
    monkeypatch.setattr(state_files, "save_file", elsewhere)
    monkeypatch.setattr(state_files, "sync_to_disk", lambda file: None)
    monkeypatch.setattr(state_files, "sha256", lambda file: "0")
    (text,) = set(save_parts(tmp_path, _parts()))
    assert "which rank 2 wrote, cannot be read by rank 0" in text and "file system shared by all nodes" in text


@pytest.mark.parametrize(
    "module, step", [(state_files, "save_file"), (state_files, "write_table"), (writing, "put_in_place")]
)
def test_renaming_the_run_folder_while_ranks_write_loses_no_data(tmp_path, monkeypatch, module, step):
    run, done, lock = tmp_path / "run", getattr(module, step), threading.Lock()

    def rename_first(*args):
        with lock:
            if not (tmp_path / "renamed").exists():
                run.rename(tmp_path / "renamed")
        return done(*args)

    monkeypatch.setattr(module, step, rename_first)
    path = save_cut(run, STATE, 3)
    assert checkpoint.saved_steps(run) == [path]
    assert torch.equal(checkpoint.open_state(path).whole("model/a"), STATE["model/a"])


def test_a_saved_step_is_not_saved_again(tmp_path):
    path = save_cut(tmp_path, STATE, 2)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save_cut(tmp_path, {"model/a": torch.zeros(3)}, 2) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


@pytest.fixture
def saved(tmp_path):
    return save_cut(tmp_path, STATE, 3)


FILES = [*part_files(3), TABLE_FILE]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "folder", "pipe"])
def test_damage_to_any_file_of_a_checkpoint_is_reported_in_one_line(saved, file, damage):
    whole_file = (saved / file).read_bytes()
    (saved / file).unlink()
    if damage == "truncated":
        (saved / file).write_bytes(whole_file[:-1])
    elif damage == "flipped":
        (saved / file).write_bytes(whole_file[:-2] + bytes([whole_file[-2] ^ 1]) + whole_file[-1:])
    elif damage == "folder":
        (saved / file).mkdir()
    elif damage == "pipe":
        os.mkfifo(saved / file)
    assert resuming.find(saved.parents[1], "auto") == saved  # an older checkpoint must not be used silently
    for read in (checkpoint.open_state, checkpoint.read_weights):
        with pytest.raises(UserError, match=rf"{saved.name}: {file} is damaged \(.*remove the folder") as caught:
            read(saved)
        assert "\n" not in str(caught.value)


def test_the_message_about_a_damaged_checkpoint_names_the_one_before_it(tmp_path):
    for step in (9, 10, 11):
        path = save(tmp_path, {"model/w": torch.ones(2)}, checkpoint.Info(step, 0, 42, {}, {}), keep=9)
        aim = "use step-000000" + f"{step - 1:02d}" if step > 9 else "begin again, because there is no older checkpoint"
        with pytest.raises(UserError, match=f"remove the folder to {aim}"):
            raise state_files.damaged(path, "a", "b")


def test_the_integrity_check_is_distributed_over_ranks(saved):
    (saved / FILES[1]).write_bytes(b"")
    for rank in (0, 2):
        checkpoint.open_state(saved, rank, 3)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.open_state(saved, 1, 3)


def test_a_damaged_field_of_the_state_is_named_briefly(saved):
    about = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(about | {"step": "x", "seed": None}))
    with pytest.raises(UserError) as caught:
        checkpoint.read_info(saved)
    assert re.search(r"state\.json is damaged \(step: .+\); remove", str(caught.value))


@pytest.mark.parametrize("file", part_files(3))
def test_a_state_file_without_its_checksum_is_refused(saved, file):
    """The file may be from another step. Only its checksum can show this, so a missing checksum is an error."""
    other = save_cut(saved.parents[1], {name: tensor + 1 for name, tensor in STATE.items()}, 3, step=2)
    (saved / file).write_bytes((other / file).read_bytes())
    info = json.loads((saved / "state.json").read_text())
    del info["sha256"][file]
    (saved / "state.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"{file} is damaged \(its checksum is missing from state.json.*remove the"):
        checkpoint.read_weights(saved)


def test_a_checkpoint_without_a_table_is_refused_even_if_its_only_file_is_complete(tmp_path):
    path = save(tmp_path, STATE, checkpoint.Info(1, 0, 42, {}, {}))
    (path / TABLE_FILE).unlink()
    with pytest.raises(UserError, match=r"table\.json is damaged \(.*No such file.*\); remove the folder"):
        checkpoint.read_weights(path)


def test_state_files_of_another_number_of_ranks_are_refused(saved):
    for number, file in enumerate(part_files(3)):
        (saved / file).rename(saved / part_files(4)[number])
    with pytest.raises(UserError, match=r"state-00001-of-00003\.safetensors is damaged"):
        checkpoint.open_state(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": 2},
        {"parts": 0},
        {"parts": 10**9},
        {"parts": "3"},
        {"shapes": {"model/a": [5, 8]}},
        {"shapes": {"model/a": [-5, -7]}},
        {"shapes": {"model/c": [1]}},
        {"shapes": {"model/a": [1 << 70]}, "pieces": {"model/a": [[0, 1 << 70]]}},
        {"pieces": {"model/a": [[0, 20], [1, 15]]}},
        {"pieces": {"model/a": [[3, 35]]}},  # there is no file 3
        {"pieces": {"model/a": [[9, 35]]}},
        {"pieces": {"model/a": [[-1, 35]]}},
        {"pieces": {"model/a": [["../../x", 35]]}},
        {"pieces": []},
    ],
    ids=str,
)
def test_a_malicious_table_is_refused_in_one_line_and_reads_no_other_file(saved, change):
    table, info = (json.loads((saved / name).read_text()) for name in (TABLE_FILE, "state.json"))
    for key, value in change.items():
        table[key] = table[key] | value if isinstance(value, dict) else value
    (saved / TABLE_FILE).write_text(json.dumps(table))
    (saved / "state.json").write_text(
        json.dumps(info | {"sha256": info["sha256"] | {TABLE_FILE: state_files.sha256(saved / TABLE_FILE)}})
    )
    with pytest.raises(UserError, match="is damaged") as caught:
        checkpoint.read_weights(saved)
    assert "\n" not in str(caught.value)


def test_a_slice_with_another_dtype_or_size_is_refused(saved):
    info = json.loads((saved / "state.json").read_text())
    file = saved / part_files(3)[0]
    pieces = load_file(file)
    for other in (pieces["model/a"].double(), pieces["model/a"][:-1], None):
        save_file({"model/a": other} if other is not None else {"x": torch.ones(1)}, file)
        sums = info["sha256"] | {file.name: state_files.sha256(file)}
        (saved / "state.json").write_text(json.dumps(info | {"sha256": sums}))
        with pytest.raises(UserError, match=r"state-00001-of-00003\.safetensors is damaged"):
            checkpoint.open_state(saved).whole("model/a")


def test_a_state_in_several_files_is_checked_against_the_model(saved):
    state = checkpoint.open_state(saved)
    state.check({"model/a": (5, 7)})
    for shapes, words in (({"model/a": (7, 5)}, "has the shape"), ({"model/c": (1,)}, "has no tensor model/c")):
        with pytest.raises(UserError, match=words):
            state.check(shapes)
    with pytest.raises(UserError, match="has no tensor model/c"):
        state.read("model/c", 0, 1)


def test_a_checkpoint_that_is_not_visible_on_a_node_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"rank 5 cannot find it; run.dir must be on a file system shared by all nodes"):
        checkpoint.open_state(tmp_path / "step-00000001", 5, 8)


def test_staging_reuses_the_memory_of_the_previous_copy(tmp_path):
    staging = Staging()
    first = staging.copy(lambda: cut(STATE, 0, 1))
    assert all(torch.equal(first[n].data.view(t.shape), t) for n, t in STATE.items())
    for part in (cut(STATE, 0, 2), cut(STATE, 0, 1)):
        again = staging.copy(lambda part=part: part)
        assert again["model/a"].data.data_ptr() == first["model/a"].data.data_ptr()
    longer = staging.copy(lambda: cut(STATE | {"model/c": torch.ones(2)}, 0, 1))
    assert longer["model/c"].data.tolist() == [1, 1]


def test_an_update_waits_for_the_copy_in_progress():
    """The update also proceeds if the copy fails."""
    staging = Staging()
    staging.wait()
    staging.begin(torch.device("cpu"))
    waiting = threads.start(staging.wait)
    time.sleep(0.05)
    assert not waiting.done()
    with pytest.raises(ZeroDivisionError):
        staging.copy(lambda: 1 / 0)
    waiting.result(threads.LIMIT_S)


def _saver(run_dir, fragments, log=lambda text: None, **given):
    """Return a saver of one rank."""
    usual = {"rank": 0, "world": 1, "is_main": True, "lasting": None, "agreements": itertools.count()} | given
    ranks = SimpleNamespace(
        device=torch.device("cpu"), together=lambda work: work(), sum=lambda values: values, **usual
    )
    ranks.agreement = partial(Ranks.agreement, ranks)
    options = {"keep": 9, "constants": {}, "suggested_fix": "", "keep_folder": lambda: "", "after_save": print}
    return Saver(run_dir=run_dir, engine=SimpleNamespace(fragments=fragments), ranks=ranks, log=log, **options)


@pytest.mark.parametrize("step", [6, 7])
def test_a_trainer_saves_all_values_from_which_it_resumes(step):
    """The learning rate decays after step 6."""
    saved = []
    trainer = SimpleNamespace(
        heartbeats=SimpleNamespace(mark=lambda what: None),
        saver=SimpleNamespace(save=saved.append),
        step=step,
        config=SimpleNamespace(train=SimpleNamespace(global_batch=16), run=SimpleNamespace(seed=5)),
        sections={"model": {"depth": 2}},
        schedule=SimpleNamespace(changes=(Change(2, 9), Change(4, 8)), decay_begin=6),
        limit=SimpleNamespace(spent=3.5),
        stream={"data.train": "1 shard"},
        task=SimpleNamespace(attention={"encoder": "a kernel"}),
    )
    Trainer._save(trainer)
    assert saved == [
        checkpoint.Info(
            step=step,
            samples=16 * step,
            seed=5,
            config={"model": {"depth": 2}},
            versions=checkpoint.versions(),
            stream={"data.train": "1 shard"},
            attention={"encoder": "a kernel"},
            changes=[(2, 9), (4, 8)],
            decays=step > 6,
            spent=3.5,
        )
    ]


def test_a_second_saver_of_a_process_does_not_read_answers_of_the_first(tmp_path):
    """Each evaluation task that trains has its own saver. Rank 0 creates its savers later than rank 1. The second saver
    of rank 1 must not read the answer that was meant for its first saver."""
    store, numbers = dist.HashStore(), [itertools.count(), itertools.count()]
    for answer in ("first", "second"):

        def decide(rank, answer=answer):
            own = _saver(tmp_path, None, rank=rank, world=2, lasting=store, agreements=numbers[rank])
            time.sleep(0.1 * (rank == 0))
            return own._agreement.decide("", lambda _: answer)

        assert threads.map_threads(decide, range(2)) == [answer] * 2


def test_a_save_starts_the_copy_for_which_the_next_update_waits(tmp_path):
    """The copying thread begins late."""
    listed, messages = threading.Event(), []
    with _saver(tmp_path, lambda: listed.wait(60) and cut(STATE, 0, 1), messages.append) as saver:
        saver.save(checkpoint.Info(3, 12, 0, {}, {}))
        waiting = threads.start(saver.engine.before_update)
        time.sleep(0.05)
        assert not waiting.done() and saver.busy and saver.awaits(4) and not saver.awaits(3)
        listed.set()
        waiting.result(threads.LIMIT_S)
    assert messages == [f"saved {path}" for path in checkpoint.saved_steps(tmp_path)]


def test_an_evaluation_marks_the_checkpoint_of_its_step_as_good(tmp_path):
    with _saver(tmp_path, lambda: cut(STATE, 0, 1)) as saver:
        for step in (2, 3):
            if step == 2:
                saver.evaluation_was_finite(step)
            saver.save(checkpoint.Info(step, 12, 0, {}, {}))
            assert saver.awaits(step + 1) == (step == 3)
    assert [checkpoint.is_good(path) for path in checkpoint.saved_steps(tmp_path)] == [True, False]


def test_a_checkpoint_being_written_is_marked_good_once_the_next_step_is_finite(tmp_path):
    """Before an evaluation, the run waits for the checkpoint and then marks it."""
    listed = threading.Event()
    watch = SimpleNamespace(first_bad=lambda: "", bad_step=None, finite_through=4)
    with _saver(tmp_path, lambda: listed.wait(60) and cut(STATE, 0, 1)) as saver:
        saver.save(checkpoint.Info(3, 12, 0, {}, {}))
        saver.ranks.sum = lambda values: listed.set() or values  # the checkpoint is written while the run waits
        trainer = SimpleNamespace(watch=watch, ranks=SimpleNamespace(gather=lambda own: [own]), saver=saver)
        Trainer.stop_if_diverged(trainer)
        listed.set()
    (saved,) = checkpoint.saved_steps(tmp_path)
    assert checkpoint.is_good(saved)
