"""Programs import no large library before they have parsed their arguments, because importing torch takes seconds."""

import os
import re
import subprocess
import sys

import pytest

import m3ae_fast
from m3ae_fast.__main__ import MODULES, usage
from m3ae_fast.evaluation.tasks import PROBE_NAMES, TASKS
from m3ae_fast.heads import probes
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT

HELP_OF_ALL = """
import argparse, runpy, sys

def show(parser, *_):
    shown = [parser]
    for parser in shown:
        assert "usage: " in parser.format_help()
        for action in parser._subparsers._group_actions if parser._subparsers else ():
            shown += action.choices.values()
    print(module, *(parser.prog for parser in shown), sep=chr(10))
    sys.exit()

argparse.ArgumentParser.parse_args = show
for module in sys.argv[1:]:
    sys.argv = ["", "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as error:
        assert not error.code
    assert "torch" not in sys.modules, module
"""


START_ALL = """
import argparse, runpy, sys

def show(parser, *_):
    print(line, parser.prog, sep=": ")
    if parser.prog not in lines:
        lines.append(parser.prog)
    sys.exit()

argparse.ArgumentParser.parse_args = show
lines = sys.argv[1:]
for line in lines:
    _, _, module, *words = line.replace("m3ae-fast", "python -m m3ae_fast").split()
    sys.argv = [module, *words, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as error:
        assert not error.code, line
"""


def imported(*arguments, code=0):
    """Run Python and return the modules that it imported, and what it printed."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return names, done.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))


def test_importing_the_package_imports_no_large_library():
    names, _ = imported("-c", "import m3ae_fast; assert 'pretrain' in m3ae_fast.__all__")
    assert not names & {"torch", "numpy", "pydantic", "rich", "m3ae_kernels"}


def test_evaluation_imports_no_library_that_takes_longer_than_torch():
    names, _ = imported("-c", "import m3ae_fast.evaluation.knn")
    assert "torch" in names and not names & {"torch._dynamo", "torchvision", "timm", "tensorboard"}


def test_help_of_every_program_and_its_commands_does_not_import_torch():
    modules = MODULES.values()
    _, output = imported("-c", HELP_OF_ALL, *modules)
    shown = {line.strip() for line in output.splitlines()}
    assert {*modules} <= shown
    tools = ("make", "table", "stats", "tokenizer")
    assert {f"m3ae-fast shards {tool}" for tool in tools} <= shown
    assert {f"m3ae-fast draw {what}" for what in ("reconstructions", "attention")} <= shown
    assert {f"m3ae-fast evaluate {task}" for task in TASKS} <= shown
    assert tuple(probes.PROBES) == PROBE_NAMES  # the names are known without importing torch


def test_every_command_can_be_started_in_every_way_named_in_the_help():
    """The list of commands and the first line of each command's help contain the ways to start a command."""
    ways = re.findall(r"(?:m3ae-fast|python -m m3ae_fast)[ .]COMMAND", usage())
    lines = [way.replace("COMMAND", command) for way in ways for command in MODULES]
    _, output = imported("-W", "ignore", "-c", START_ALL, *lines)  # runpy warns about a module that is already imported
    programs = dict(line.split(": ") for line in output.splitlines())
    assert len(ways) == 2 and programs.keys() == {*lines, *programs.values()}
    assert all(re.split("[ .]", line)[-1] == re.split("[ .]", program)[-1] for line, program in programs.items())


def test_the_list_of_commands_imports_none_of_them():
    names, output = imported("-m", "m3ae_fast", "--help")
    assert not names & {"torch", "pydantic", "argparse"} and all(f"  {command} " in output for command in MODULES)


@pytest.mark.parametrize("arguments", [["--config", "nothing.json"], ["--config", "configs/base.json", "--set", "a=1"]])
def test_an_invalid_config_is_reported_before_torch_is_imported(arguments):
    names, output = imported("-m", "m3ae_fast", "train", *arguments, code=2)
    assert "torch" not in names and "error: config " in output


def test_an_invalid_setting_of_pretrain_is_reported_before_torch_is_imported(tmp_path):
    arguments = (str(tmp_path), "--out", str(tmp_path / "run"), "--set", "train.global_bach=64")
    names, output = imported("-m", "m3ae_fast", "pretrain", *arguments, code=2)
    assert (
        "torch" not in names
        and output == "error: --set: unknown key train.global_bach; did you mean train.global_batch?"
    )


def test_only_the_first_of_several_ranks_checks_the_config(monkeypatch):
    from m3ae_fast.process.launchers import alone

    for name in ("WORLD_SIZE", "RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert alone()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not alone()
    monkeypatch.delenv("WORLD_SIZE")
    assert dict(os.environ) == before


def test_an_unknown_command_is_refused_in_one_line():
    names, output = imported("-m", "m3ae_fast", "trian", code=2)
    assert output == "error: there is no command 'trian'; m3ae-fast --help lists the commands" and "torch" not in names


def test_help_shows_the_typed_command_name_and_version_prints_the_version():
    script = "import sys; sys.argv = ['bin/m3ae-fast', 'embed', '-h']; from m3ae_fast.__main__ import run; run()"
    for arguments, typed in (
        (["-m", "m3ae_fast", "report", "--help"], "python -m m3ae_fast report"),
        ([f"{ROOT}/m3ae_fast/train.py", "--help"], f"{ROOT}/m3ae_fast/train.py"),
        (["-c", script], "m3ae-fast embed"),
    ):
        _, output = imported(*arguments)
        assert output.startswith(f"usage: {typed} ")
    _, output = imported("-m", "m3ae_fast", "--version")
    assert output.strip() == f"m3ae-fast {m3ae_fast.__version__}"
