"""Untrusted files cannot start a program or determine an output path in any command, unless the user allows it."""

import json
import sys

import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli import convert, draw, report
from m3ae_fast.cli import embed as features
from m3ae_fast.cli import evaluate as transfer_main
from m3ae_fast.data import ShardStore
from m3ae_fast.evaluation.run_report import REPORT_FILE
from tests.helpers.labelled import labelled_tar, tiny_run

started = []  # arguments of the programs that the process tries to start while `watching`
watching = []


def _hook(event, arguments):
    if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        started.append(str(arguments))


sys.addaudithook(_hook)  # an audit hook cannot be removed


@pytest.fixture
def programs():
    started.clear()
    watching.append(True)
    yield started
    watching.clear()


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    return labelled_tar(tmp_path / "mine.tar", range(6))


def _run(folder, **changes):
    """Write a run folder whose state.json has `changes` in its data section."""
    torch.manual_seed(0)
    run = tiny_run(folder)
    path = checkpoint.saved_steps(run)[-1] / checkpoint.INFO_FILE
    info = json.loads(path.read_text())
    info["config"]["data"] |= {"workers": 0, **changes}
    path.write_text(json.dumps(info))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return run


def _named(*shards):
    return [{"shards": list(shards)}]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch {marker}",
        "{{{shards},pipe:touch {marker}}}",  # nested braces
        "{shards}::pipe:touch {marker}",
        "PIPE:touch {marker}; : ://",
        " pipe:touch {marker}; : ://",
        "scp://host/$(touch {marker})",
        "ais://bucket/a.tar",
    ],
)
def test_a_run_whose_shards_execute_a_command_is_refused_in_one_line(tmp_path, shards, programs, split, pattern):
    marker = tmp_path / "marker"
    named = _named(pattern.format(shards=shards, marker=marker))
    run = _run(tmp_path / "run", **{"train": _named(shards), "val": [], split: named})
    with pytest.raises(UserError, match=r"which run a program; add --trust .* with --val") as caught:
        draw.main(["reconstructions", str(run)])
    assert "\n" not in str(caught.value) and not marker.exists() and not programs
    assert not (run / "reconstructions.png").exists()


def test_the_trust_option_or_shards_given_by_the_user_allow_an_untrusted_run(tmp_path, shards):
    run = _run(tmp_path / "run", train=_named(shards), val=_named(f"pipe:touch {tmp_path}/theirs; cat {shards}"))
    assert (
        draw.main(
            ["reconstructions", str(run), "--pictures", "1", "--val", f"pipe:touch {tmp_path}/mine; cat {shards}"]
        )
        == 0
    )
    assert (tmp_path / "mine").exists() and not (tmp_path / "theirs").exists()
    assert draw.main(["reconstructions", str(run), "--pictures", "1", "--trust"]) == 0
    assert (tmp_path / "theirs").exists()


def test_the_users_own_runs_do_not_require_the_trust_option(tmp_path, shards):
    ShardStore(tmp_path / "cache")
    run = _run(tmp_path / "run", train=_named(shards), val=[], cache_dir=str(tmp_path / "cache"))
    assert draw.main(["reconstructions", str(run), "--pictures", "1"]) == 0


def test_an_untrusted_run_cannot_turn_a_folder_into_a_cache(tmp_path, shards):
    """If the folder became a cache, files in its sub-folder `shards` could be removed to free space."""
    (tmp_path / "precious/shards").mkdir(parents=True)
    run = _run(tmp_path / "run", train=_named(shards), val=[], cache_dir=str(tmp_path / "precious"))
    with pytest.raises(UserError, match=r"sets data.cache_dir to .*precious, which is not yet a cache folder"):
        draw.main(["reconstructions", str(run)])
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["shards"]


COMMANDS = {
    "convert timm": lambda run, shards, out: convert.main([run, "--out", f"{out}/model", "--format", "timm"]),
    "convert": lambda run, shards, out: convert.main([run, "--out", f"{out}/model"]),
    "features": lambda run, shards, out: features.main(
        [run, shards, "--out", f"{out}/a.npz", "--set", "data.workers=0"]
    ),
    "transfer": lambda run, shards, out: transfer_main.main(
        ["knn", run, "--train", shards, "--val", shards, "--out", f"{out}/knn", "--set", "data.workers=0"]
    ),
    "report": lambda run, shards, out: report.main([run]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_executes_programs_or_writes_to_paths_named_by_an_untrusted_run(
    tmp_path, shards, programs, capsys, command
):
    out = tmp_path / "out"
    out.mkdir()
    marker = tmp_path / "marker"
    evil = f"pipe:touch {marker}"
    names = {"tokenizer": evil, "image_tokenizer": evil, "cache_dir": str(tmp_path / "theirs")}
    run = _run(tmp_path / "run", train=_named(evil), val=_named(evil), **names)
    path = checkpoint.saved_steps(run)[-1] / checkpoint.INFO_FILE
    info = json.loads(path.read_text())
    info["config"]["model"]["init_from"] = evil
    info["config"]["run"] |= {"dir": str(tmp_path / "theirs"), "loggers": ["wandb"]}
    path.write_text(json.dumps(info))
    COMMANDS[command](str(run), shards, out)
    assert not marker.exists() and not any(str(marker) in words for words in programs)
    found = {path.name for path in tmp_path.iterdir()} - {"mine.tar", "mine.tar.index", "home-cache"}
    assert found == {"out", "run"}


def test_a_report_does_not_include_files_outside_the_run_folder(tmp_path):
    run = _run(tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    (run / "task").mkdir()
    (run / "task/result.json").write_text('{"task": "knn"}')
    for name in ("reconstructions.png", "task/a.png"):
        (run / name).symlink_to(tmp_path / "secret")
    assert report.main([str(run)]) == 0
    assert "bWluZQ" not in (run / REPORT_FILE).read_text()
