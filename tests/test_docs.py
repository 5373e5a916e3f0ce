"""The README, the guide and --help are correct: the programs accept the commands that they show, and the settings and
files that they name exist."""

import argparse
import importlib
import json
import re
import shlex
from itertools import takewhile

import pytest
from pydantic import BaseModel

from m3ae_fast.__main__ import MODULES
from m3ae_fast.config import Config, parse
from m3ae_fast.config.messages import section_of
from tests.conftest import LONGEST
from tests.helpers.trainer import ROOT

GUIDE = [page for folder in ("recipes", "guide") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/evaluation-tasks.md")),
    *GUIDE,
]
FOLDERS = ("docs", "kernels", "lab", "benchmarks", "examples")
LINKED = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
MODULE = r"(?:m3ae_fast/(train)\.py|m3ae-fast (\w+)|-m m3ae_fast (\w+)|--module m3ae_fast\.(train))"


def commands() -> list[str]:
    """Return each command of the project in the pages' code blocks and between backticks."""
    found: list[str] = []
    for text in TEXT.values():
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
        found += [line for block in blocks for line in block.splitlines() if re.search(MODULE, line)]
        rest = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
        found += re.findall(r"`(m3ae-fast \w+ [^`\n]+)`", rest)
    return [*found, *examples_of_help()]


def examples_of_help() -> list[str]:
    """Return each command of the project in the programs' help, except headings, which have a colon."""
    texts = [""]
    for name in MODULES.values():
        program = importlib.import_module(name)
        texts += [text for text in vars(program).values() if isinstance(text, str)]  # descriptions of its commands
    lines = [line.strip() for text in dict.fromkeys(texts) for line in text.splitlines()]
    return [line for line in lines if re.match(rf"(\w[^`]* )?{MODULE}", line) and not re.search(r":( |$)", line)]


class Accepted(Exception):
    pass


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_is_accepted(command, monkeypatch, capsys):
    """The program accepts the command, and files of the repository that it names exist."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **options):
        parse(self, *args, **options)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    found = re.search(MODULE, command)
    words = [*takewhile(lambda word: word != "|", shlex.split(command[found.end() :], comments=True))]
    assert all((ROOT / word).exists() for word in words if word.startswith("configs/"))
    word = found[1] or found[2] or found[3] or found[4]
    program = importlib.import_module(MODULES[word])
    with pytest.raises((Accepted, SystemExit)) as stopped:
        program.main(words)
    assert stopped.type is Accepted or stopped.value.code == 0, capsys.readouterr().err  # 0: --help


def test_every_setting_named_in_the_docs_exists():
    sections = "|".join(Config.model_fields)
    named = {name for text in TEXT.values() for name in re.findall(rf"`((?:{sections})\.(?!py`)[a-z_.]+)`", text)}
    assert len(named) > 10
    for name in named:
        place: type[BaseModel] | None = Config
        for key in name.split("."):
            assert place is not None and key in place.model_fields, name
            place = section_of(place.model_fields[key].annotation)


def test_every_config_that_is_shown_is_valid():
    """A JSON block is a complete config, some of its sections, or a result."""
    blocks = [block for text in TEXT.values() for block in re.findall(r"^```json\n(.*?)^```$", text, re.S | re.M)]
    shown = [json.loads(block if block.startswith("{") else f"{{{block}}}") for block in blocks]
    configs = [each for each in shown if "task" not in each]
    assert len(configs) > 5
    for config in configs:
        data = {"train": [{"shards": "a.tar"}]} | config.get("data", {})
        parse(Config, {"train": {"steps": 1}} | config | {"data": data}, "guide")


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text)
    assert links or page != ROOT / "README.md"
    for path, heading in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading[1:] in [re.sub(r"[^\w\s-]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("place", ["mkdocs.yml", "docs/index.md"])
def test_every_page_of_the_guide_is_listed(place):
    text = (ROOT / place).read_text(encoding="utf-8")
    assert [page.name for page in GUIDE if f"{page.parent.name}/{page.name}" not in text] == []


def test_the_recipes_are_linked_at_the_top_of_the_readme():
    top = " ".join(TEXT["README.md"].split()[:150])
    recipes = [f"docs/recipes/{page.name}" for page in GUIDE if page.parent.name == "recipes"]
    assert all(f"({path})" in top for path in [*recipes, "CONTRIBUTING.md#a-bug-in-the-loader"])


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_a_page_of_the_guide_is_short(page):
    """A page answers one question; evidence belongs to lab/ and benchmarks/, and reasons to docstrings."""
    appendix = page.name == "image-formats.md"  # a table
    assert appendix or len(TEXT[page.name].split()) <= (500 if page.parent.name == "recipes" else 1500)


def test_the_address_of_the_repository_is_in_one_place():
    text = (ROOT / "pyproject.toml").read_text()
    (address,) = re.findall(r"^Repository = \"https://(.*)\"$", text, re.MULTILINE)
    pages = [*LINKED, *ROOT.glob("*.*"), *(ROOT / "kernels").glob("*.toml")]
    found = [page for page in pages if page.is_file() and address in page.read_text(encoding="utf-8")]
    assert found == [ROOT / "pyproject.toml"] and text.count(address) == 1


def test_pre_commit_and_ci_use_the_same_version_of_ruff():
    pinned = re.search(r"\"ruff==([\d.]+)\"", (ROOT / "pyproject.toml").read_text())[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_workflow_tests_the_oldest_supported_python():
    oldest = re.search(r"requires-python = \">=([\d.]+)\"", (ROOT / "pyproject.toml").read_text())[1]
    assert f'python-version: ["{oldest}", ' in (ROOT / ".github/workflows/ci.yml").read_text()


@pytest.mark.parametrize("name", LONGEST)
def test_the_test_files_that_are_run_first_exist(name):
    assert (ROOT / "tests" / name).is_file()
