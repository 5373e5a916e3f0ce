"""Arguments and checks that all command lines share."""

import os
import re
from contextlib import suppress
from importlib import import_module

import pytest

from m3ae_fast import __main__, train
from m3ae_fast.__main__ import MODULES
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli import command_line, evaluate, option_hints, pretrain, shards
from m3ae_fast.cli.command_line import seed, use_device
from m3ae_fast.config import Config
from m3ae_fast.config.arguments import output
from m3ae_fast.config.messages import settings_called
from m3ae_fast.evaluation.tasks import TASKS

WRONG = [
    (output(), "", "is empty; specify a path"),  # such as the value of a shell variable that is not set
    (output(), "out\udcff", "is not UTF-8"),
    (output(".png"), "photo.jpg", "photo.jpg: must end in .png"),
    (output(".npz", ".parquet"), "npz", "npz: must end in .npz or .parquet"),
    (seed, "-1", "-1: must be an integer from 0"),
    (seed, "9" * 40, "9: must be an integer from 0"),
    (seed, "", "must be an integer from 0"),
]
SRUN = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node1",
}


@pytest.mark.parametrize("parse, text, message", WRONG)
def test_invalid_arguments_are_refused(parse, text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_valid_arguments_are_parsed():
    assert str(output()("a/b")) == "a/b" and output(".png")("b.png").name == "b.png"
    assert seed(str((1 << 63) - 1)) == (1 << 63) - 1


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["images", "--out", "x", "--recipe", "abc"], "--recipe"),
        (["images"], "--out"),
        (["images", "--out", "x", "--huors", "1"], "--huors 1"),
    ],
)
def test_an_option_that_argparse_refuses_is_reported_in_one_line(capsys, arguments, named):
    with pytest.raises(UserError) as error:
        pretrain.main(arguments)
    message, _, advice = str(error.value).partition("; ")
    assert named in message and "\n" not in message and advice == "`m3ae-fast pretrain --help` lists the options"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("parse", "line", "advice"),
    [
        (pretrain.main, "photos --out x --epochs 10", "use --set train.epochs=10"),
        (pretrain.main, "photos --out x --batch-size=64", "use --set train.global_batch=64"),
        (pretrain.main, "photos --out x --image_size 64", "use --set model.image_size=64"),
        (pretrain.main, "photos --out x --lr", "use --set optim.peak_lr=VALUE"),
        (pretrain.main, "photos --out x --gpus 8", pretrain.SEVERAL_RANKS),
        (pretrain.main, "photos --out x --model base", "use --set model.size=base or, .*--from MODEL"),
        (pretrain.main, "--data photos --out x", "give SOURCE without an option"),
        (train.main, "--config base --epochs 10", "use --set train.epochs=10"),
        (train.main, "--config base --model small", "use --set model.size=small"),
        (train.main, "--config base --gpus 8", "use torchrun --nproc-per-node N -m m3ae_fast train"),
        (train.main, "--config base --data photos", "use --train SHARDS"),
    ],
)
def test_the_error_for_an_option_of_another_program_names_what_replaces_it(parse, line, advice):
    advice = advice if ".*" in advice else re.escape(advice)
    with pytest.raises(UserError, match=rf"^unrecognized arguments: --.*; {advice}; `.* --help` lists the options$"):
        parse(line.split())


def test_the_settings_that_replace_options_exist():
    for setting in option_hints._SETTINGS.values():
        key = setting.partition(".")[2]
        assert setting in settings_called(Config, key)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("words", [["help"], ["help", "shards", "make"], ["--help", "shards", "make"], ["-h", "-h"]])
def test_help_of_the_program_and_of_a_command_is_printed(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["m3ae-fast", *words])
    with suppress(SystemExit):
        assert __main__.run() == 0
    assert capsys.readouterr().out.startswith(f"usage: m3ae-fast {'shards make' if 'make' in words else 'COMMAND'} ")


@pytest.mark.parametrize(
    ("parse", "line", "message"),
    [
        (
            shards.main,
            "stats a.tar --dtype int8",
            r".*--dtype: invalid choice.*; `m3ae-fast shards stats --help",
        ),
        (
            shards.main,
            "stats a.tar --chanels 3",
            r".*--chanels 3; `m3ae-fast shards stats --help",
        ),
        (evaluate.main, "knn m --val v --train t --out o --k 3", r".*--k 3; `m3ae-fast evaluate knn --help"),
    ],
)
def test_the_error_for_a_wrong_argument_points_to_the_help_of_its_subcommand(parse, line, message):
    with pytest.raises(UserError, match=message):
        parse(line.split())


@pytest.mark.parametrize("line", ["--huors 1", "--seed x", "--out "])
@pytest.mark.parametrize("variables", [{"RANK": "{}", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "{}", **SRUN}])
def test_a_wrong_argument_given_to_several_ranks_is_reported_once(monkeypatch, capsys, line, variables):
    monkeypatch.setattr(command_line, "_FIRST_S", 0.0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # other tests may have set them in this process
        monkeypatch.delenv(name, raising=False)
    words = ["images", *line.split(" ")]
    for rank in ("0", "1"):
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(rank))
        assert exit_cleanly(lambda: pretrain.main(words)) == 2
        assert capsys.readouterr().err.count("error: ") == (rank == "0")


def test_options_that_abbreviate_a_setting_apply_in_command_line_order():
    line = "--config base --train a.tar b.tar --seed 3 --set run.seed=4 --out runs/mine --val c.tar"
    assert train.parse_args(line.split()).set == [
        'data.train=[{"shards": ["a.tar", "b.tar"]}]',
        "run.seed=3",
        "run.seed=4",
        'run.dir="runs/mine"',
        'data.val=[{"shards": ["c.tar"]}]',
    ]
    assert train.parse_args(["--config", "base"]).set == []
    with pytest.raises(UserError, match="--seed x: must be an integer"):
        train.parse_args(["--config", "base", "--seed", "x"])


def test_the_device_option_hides_gpus_only_for_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    use_device(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    use_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


FIRST = ["pretrain", "train", "embed", "evaluate", *(f"evaluate {task}" for task in TASKS)]


@pytest.mark.parametrize("command", FIRST)
def test_the_help_of_a_command_fits_on_a_screen_and_names_all_its_options(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "100")
    name, *task = command.split()
    shown = []
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            import_module(MODULES[name]).main([*task, *words])
        shown.append(capsys.readouterr().out)
    short, whole = shown
    assert len(short.splitlines()) <= 42 and max(map(len, short.splitlines())) <= 104
    options = {option for text in shown for option in re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)}
    assert "--set" in options or name == "evaluate"
    assert options <= {*re.findall(r"--[a-z][a-z-]+", short)}
    assert ("\nsettings, which are passed with --set" in whole) == bool(task) and "\nsettings, which" not in short
