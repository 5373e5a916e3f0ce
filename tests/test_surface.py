"""The number of settings, commands and options that a user has to know stays small."""

import argparse
from importlib import import_module

import pytest

from m3ae_fast.__main__ import MODULES
from tests.helpers.trainer import ROOT

MOST_SETTINGS = {"config.md": 110, "evaluation-config.md": 40}  # rows of the pages of settings
COMMANDS = {
    "pretrain", "train", "embed", "neighbours", "convert", "report", "verify", "shards make", "shards table",
    "shards stats", "shards tokenizer", "evaluate knn", "evaluate logistic", "evaluate linear", "evaluate attentive",
    "evaluate finetune", "evaluate segment", "evaluate robustness", "evaluate ood", "evaluate compare",
    "draw reconstructions", "draw attention",
}  # fmt: skip
MOST_OPTIONS = 60  # different names of long options, without --help


@pytest.fixture
def parsers(monkeypatch):
    """Return the parser of each command that has no sub-commands, by the command's name."""
    found = {}

    def collect(parser, *_):
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            found[parser.prog.removeprefix("m3ae-fast ")] = parser
        for each in (choice for group in groups for choice in group.choices.values()):
            collect(each)

    def parse_args(parser, *_):
        collect(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for module in MODULES.values():
        with pytest.raises(SystemExit):
            import_module(module).main([])
    return found


@pytest.mark.parametrize("page", MOST_SETTINGS)
def test_the_number_of_settings_is_small(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    print(f"{page}: {len(rows)} settings")
    assert 0 < len(rows) <= MOST_SETTINGS[page]


def test_there_are_no_other_commands(parsers):
    print(f"{len(parsers)} commands: {', '.join(parsers)}")
    assert parsers.keys() == COMMANDS and len(parsers) <= 22


def test_the_number_of_different_options_is_small(parsers):
    shown = (action for parser in parsers.values() for action in parser._actions if action.help != argparse.SUPPRESS)
    options = {option for action in shown for option in action.option_strings if option.startswith("--")} - {"--help"}
    print(f"{len(options)} options: {' '.join(sorted(options))}")
    assert len(options) <= MOST_OPTIONS
