"""Output folders of weights, written atomically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3ae_fast.base.atomic_file import atomic_folder_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular, read_json

MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
TOKENIZER_FILE, PREPROCESSOR_FILE = "tokenizer.json", "preprocessor_config.json"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE, TOKENIZER_FILE, PREPROCESSOR_FILE)
# Integers and booleans are excluded because their meaning is unknown. float8 is excluded because its scales are stored
# elsewhere.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MARK = {"format": "pt", "written_by": "m3ae_fast"}


@contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill with FILES; it replaces `out` when the block ends. Raises UserError if `out` is a
    file, is a folder that holds anything except an earlier output of this package, or cannot be written. After any
    exception, `out` is unchanged, unless the message states that it could not be restored."""
    target = Path(out).resolve()
    _check_free(out, target)
    try:
        with atomic_folder_write(target) as partial:
            yield partial
            for path in partial.iterdir():
                path.chmod(0o666 & partial.stat().st_mode)  # safetensors creates files that only their owner can read
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{out}: cannot be written ({reason})") from None


def _check_free(out: str | Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{out}: is a file; specify a folder")
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not found:
        return
    others = sorted(found - set(FILES))
    if others or not _is_ours(target / MODEL_FILE):
        what = others[0] if others else "a model of another program"
        raise UserError(f"{out}: already contains {what}; specify a new folder")


def _is_ours(path: Path) -> bool:
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("written_by") == _MARK["written_by"]
    except (OSError, SafetensorError):
        return False


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json; empty if there is none, or if it cannot be read."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the weights in a safetensors file, by name.

    Raises:
        OSError, SafetensorError: the file cannot be read, is a pipe or a device, or is damaged.
        UserError: a tensor has a dtype that weights cannot have; see `check_dtypes`.
    """
    open_regular(path).close()  # raises an error for a pipe, which safetensors would wait for
    state = load_file(path)
    check_dtypes(state, str(path))
    return state


def check_dtypes(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError with the name of the first tensor whose dtype is not one of DTYPES."""
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            found = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {name} has dtype {found}, but weights must be {kinds}; convert it")


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors of any shape and dtype as a safetensors file. A mark in the file shows `output_folder` that this
    package has written it. Raises OSError or SafetensorError if the file cannot be written."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=_MARK)
