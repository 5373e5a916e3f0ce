"""Parsers and options that several programs share."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from m3ae_fast.base.environment import DEVICES, Device
from m3ae_fast.base.errors import ErrorElsewhere, UserError
from m3ae_fast.config.arguments import Arguments
from m3ae_fast.process.launchers import is_first_rank

A = TypeVar("A", bound=Arguments)
_FIRST_S = 10.0  # seconds that other ranks wait for rank 0 to report a mistake, because rank 0 may start later


class _Help(argparse.Action):
    """The option --help, which prints the short help, or with the value "all" the whole help."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print(parser.format_help() if values == "all" else parser.short_help(), end="")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError for a mistake, whereas argparse would print the usage and exit. Mistakes in the
    arguments of a command are reported by the command's own parser. Its help is short: options that are in a group, and
    the settings in the epilog, are only named, and `--help all` explains them."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, add_help=False)
        self.add_argument("-h", "--help", action=_Help, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def short_help(self) -> str:
        """Return the help without the epilog and without groups of options. A group of commands is included."""
        groups = self._action_groups[2:]  # the first two groups are the positional arguments and the options
        more = [group for group in groups if all(action.option_strings for action in group._group_actions)]
        first = [group for group in self._action_groups if group not in more]
        actions = [action for group in first for action in group._group_actions if action.help != argparse.SUPPRESS]
        formatter = self._get_formatter()
        needed = [action for action in actions if action.required and action.option_strings]
        words = [f"{action.option_strings[0]} {action.metavar}" for action in needed]
        places = [formatter._format_args(action, "").strip() for action in actions if not action.option_strings]
        formatter.add_usage(" ".join([self.prog, *places, *words, "[OPTIONS]"]), [], [])
        formatter.add_text(self.description)
        for group in first:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        names = [action.option_strings[-1] for group in more for action in group._group_actions]
        if names or self.epilog:
            names += ["settings"] if self.epilog else []
            text = f"more options, explained by `{self.prog} --help all`: {', '.join(names)}"
            formatter.add_text(textwrap.fill(text, formatter._width, break_on_hyphens=False))
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; `{self.prog} --help` lists the options")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        try:
            found, unknown = super().parse_known_args(args, namespace)
        except UserError as error:  # raised by the function that parses a value
            refuse(str(error))
        if unknown:
            from m3ae_fast.cli.option_hints import hint  # here, because it imports the config, which takes a while

            instead = hint(self.prog, unknown)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{instead and f'; {instead}'}")
        return found, []


def refuse(message: str) -> NoReturn:
    """Raise UserError for a mistake in the arguments of the program. Since all ranks have the same arguments, only rank
    0 raises it. The other ranks raise ErrorElsewhere a little later, because the launcher ends all ranks when the first
    one exits."""
    if is_first_rank():
        raise UserError(message) from None
    time.sleep(_FIRST_S)
    raise ErrorElsewhere(message) from None


def program(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser for `m3ae-fast NAME`. Its help shows the command as the user typed it, and the lines of `text`
    unchanged."""
    shown = argparse.RawDescriptionHelpFormatter
    typed = sys.argv[0] if sys.argv[0].endswith((f"m3ae_fast {name}", f"{name}.py")) else f"m3ae-fast {name}"
    return _Parser(prog=typed, description=text, formatter_class=shown)


def command(
    commands: Any, name: str, summary: str, text: str, perform: Callable, common: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    """Return a parser for a command of a program. `perform`: function that runs the command on the parsed arguments;
    `common`: parent parser with further arguments."""
    shown, parents = argparse.RawDescriptionHelpFormatter, [common] if common else []
    parser = commands.add_parser(name, parents=parents, help=summary, description=text, formatter_class=shown)
    parser.set_defaults(perform=perform)
    return parser


def add_settings(parser: argparse.ArgumentParser, more: argparse._ArgumentGroup, example: str) -> None:
    """Add `--set KEY=VALUE` and, to the group `more`, `--seed`, `--device` and the options that the deepspeed launcher
    adds."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a setting, for example --set {example} (in Python: overrides)",
    )
    add_setting(more, "--seed", "run.seed", seed, "random seed")
    add_device(more)
    add_local_rank(parser)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Add the option that the deepspeed launcher adds to the command line. It has no effect."""
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def checked(kind: type[A], given: Mapping[str, Any]) -> A:
    """Return the checked arguments of a command. `given`: the arguments by name, as a parser has found them. A mistake
    is reported as in `refuse`."""
    try:
        return kind.of_command({name: value for name, value in given.items() if name != "local_rank"})
    except UserError as error:
        refuse(str(error))


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add `--device`."""
    text = (
        "device to use; with cpu, the GPUs of this machine are ignored (default: cuda if there is a GPU, otherwise cpu)"
    )
    parser.add_argument("--device", choices=DEVICES, help=text)


def add_setting(
    parser: argparse._ActionsContainer, option: str, key: str, parse: Callable[[str], Any], text: str
) -> None:
    """Add an option that is short for `--set KEY=VALUE`. `parse`: function that converts the argument to the value;
    `text`: the help."""
    shown = "DIR" if option == "--out" else "N"
    text = f"{text}: short for --set {key}={shown}"
    parser.add_argument(option, action=_Setting, **_into_set(key), type=parse, metavar=shown, help=text)


def add_samples(parser: argparse.ArgumentParser, option: str, key: str, text: str) -> None:
    """Add an option for the shards of the setting KEY, which is a list of data sources. `text`: the help."""
    parser.add_argument(option, action=_Samples, **_into_set(key), nargs="+", metavar="SHARDS", help=text)


def _into_set(key: str) -> dict[str, Any]:
    return {"dest": "set", "const": key, "default": argparse.SUPPRESS}  # the default of --set applies


class _Setting(argparse.Action):
    def value(self, given: Any) -> Any:
        return given

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        value = json.dumps(self.value(values), default=str)
        namespace.set = [*namespace.set, f"{self.const}={value}"]


class _Samples(_Setting):
    def value(self, given: Any) -> Any:
        return [{"shards": given}]


def use_device(name: Device | None) -> None:
    """Hide the GPUs from this process and its child processes if `--device` names the CPU. Must be called before torch
    is imported."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hides the GPUs from DeepSpeed too, which would use any visible GPU


def add_resume(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add `--resume`. `folder`: name of the run folder in the help."""
    parser.add_argument(
        "--resume",
        default="no",
        metavar="auto|no|PATH",
        help=f"auto: continue from the last checkpoint in {folder}, if any; no (default): start a new run; "
        "PATH: continue from that checkpoint or run folder",
    )


def seed(text: str) -> int:
    """Return the seed in a text. Raises UserError if it is not an integer from 0 to 2^63 - 1."""
    if not (text.isdecimal() and int(text) < 1 << 63):
        raise UserError(f"--seed {text}: must be an integer from 0 to 2^63 - 1")
    return int(text)
