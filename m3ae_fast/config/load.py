"""Reading of config files and `--set` overrides, and their validation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import parse_json, read_json
from m3ae_fast.config.messages import describe_error
from m3ae_fast.config.section import Section
from m3ae_fast.config.settings import Config

T = TypeVar("T", bound=Section)
# Overrides of settings in Python: one text "section.key=value", several such texts, or the values by "section.key".
Overrides: TypeAlias = "str | Sequence[str] | Mapping[str, Any]"


def override_list(overrides: Overrides) -> list[str]:
    """Return overrides as a list of "section.key=value". Raises UserError if a value cannot be written as JSON."""
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    try:
        return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items()]
    except (TypeError, ValueError) as error:
        raise UserError(f"overrides: a value cannot be written as JSON ({error})") from None


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON config file, or a shipped config by its name, and apply `section.key=value` overrides (a value that
    is not valid JSON is a plain string). Raises UserError if the file is missing or not valid JSON, or if a field is
    unknown, has the wrong type or an invalid value."""
    data = read_config(_found(path), "config")
    for override in overrides or []:
        apply_override(data, override)
    return parse(Config, data, f"config {path}")


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the shipped configs by name."""
    package = Path(__file__).resolve().parents[1]
    # the first folder exists in an installation, the second in a clone
    folders = (package / "configs", package.parent / "configs")
    folder = next((each for each in folders if (each / "base.json").is_file()), None)
    return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder else {}


def _found(path: str | Path) -> Path:
    """Return the path of a config file, or of a shipped config by its name. A path that ends in .json or contains a
    slash is returned even if there is no such file. Raises UserError if any other path is neither an existing file nor
    the name of a shipped config."""
    name = str(path)
    if Path(path).is_file() or name.endswith(".json") or "/" in name:
        return Path(path)
    shipped = shipped_configs()
    if name not in shipped:
        raise UserError(
            f"config {name}: is neither a file nor a config that comes with m3ae-fast ({', '.join(shipped)})"
        )
    return shipped[name]


def read_config(path: Path, label: str) -> dict[str, Any]:
    """Return the JSON object in a config file. Raises UserError, whose message begins with `label`, if the file cannot
    be read or does not contain a JSON object."""
    try:
        data = read_json(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{label} {path}: cannot be read ({reason}); specify an existing file") from None
    except ValueError as error:
        raise UserError(f"{label} {path}: is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{label} {path}: must contain one JSON object")
    return data


def stored_config(config: Config) -> dict[str, Any]:
    """Return the config as plain JSON data for a file in the run folder, with the absolute path of that folder."""
    data = config.model_dump(mode="json")
    data["run"]["dir"] = str(config.run.dir.resolve())
    return data


def follow(data: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the config that was stored in `run_dir`, as plain JSON data. If the stored path of the run folder is
    absolute and differs from `run_dir`, the folder has been moved or copied. Each path below the former location is
    then made relative to this location. If the first part of the relative path exists in `run_dir`, the path is
    replaced with the corresponding path below `run_dir`."""
    run = data["run"] if isinstance(data.get("run"), dict) else {}
    was = run.get("dir")
    if not isinstance(was, str) or not was.startswith("/") or Path(was) == run_dir.resolve():
        return data
    return _moved(data, f"{was}/", run_dir) | {"run": run | {"dir": str(run_dir)}}


def _moved(value: Any, was: str, now: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, was, now) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, was, now) for each in value]
    if isinstance(value, str) and value.startswith(was):
        inside = value.removeprefix(was)
        return str(now / inside) if os.path.exists(now / inside.partition("/")[0]) else value
    return value


def parse(section: type[T], data: Any, where: str) -> T:
    """Return the section with the given plain JSON data. Raises UserError with one line that begins with `where` and
    describes the first invalid field."""
    text = json.dumps(data)
    if "\\u0000" in text:  # not allowed in file names
        raise UserError(f"{where}: contains a null character")
    try:
        return section.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_error(section, error)}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply the override `section.key=value` to plain JSON data. Raises UserError if the override is malformed, names
    a list item that does not exist, or names a key below a value that is not a section."""
    name, equals, text = override.partition("=")
    override = " ".join(override.split())[:200]  # as shown in messages
    if not equals or not name:
        raise UserError(f"override {override}: must have the form section.key=value")
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    *parents, last = name.split(".")
    node: Any = data
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else _item(node, parent, override)
        if node is None:
            raise UserError(f"override {override}: {parent} is null in the file; set the whole of {parent} as JSON")
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override}: {'.'.join(parents)} is a value, not a section")


def _item(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return node[int(key)]
    raise UserError(f"override {override}: no such key or index: {key!r}")
