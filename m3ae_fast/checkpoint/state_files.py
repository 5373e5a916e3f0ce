"""The tensors of a checkpoint: one file per rank, and a table of the pieces of each tensor.

    state-00002-of-00004.safetensors     written by the second of four ranks: its pieces by name
    state.safetensors                    written by a single rank, whose pieces are complete tensors
    table.json                           the files and slices that make up each tensor

A piece is stored in the shape of the tensor if it is the complete tensor, and flat otherwise. Any program that reads
safetensors can therefore load a checkpoint that a single rank has written.

The files have torch.distributed.checkpoint's safetensors format and can be read by its HuggingFaceStorageReader.
torch's own writer is not used, because it keeps a second copy of each part in memory and does not verify that the parts
are complete. Here, the table is built from the files on disk, and only if each element of a tensor occurs in exactly
one file. torch.distributed.checkpoint's default format is not used, because its table is a pickle, which can execute
code.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3ae_fast.base.atomic_file import sync_to_disk
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.engine.fragments import Fragments

STATE_FILE, TABLE_FILE = "state.safetensors", "table.json"
ANY_PART = "state*.safetensors"
_OFFSETS = "DCP_SHARDING_INFO"  # key in a part's header; its value is {name: {"saved_offsets": [start]}} as JSON

Shape = tuple[int, ...]
_Size = Annotated[int, Field(ge=0)]


@dataclass
class Table:
    """Files and slices of all tensors in a checkpoint."""

    parts: Annotated[int, Field(ge=1, lt=100_000)]  # number of files, written with five digits in their names
    shapes: dict[str, tuple[_Size, ...]]
    # the pieces of each tensor in order, each as (index of its file, number of elements)
    pieces: dict[str, list[tuple[_Size, _Size]]]


def part_files(parts: int) -> list[str]:
    """Return the names of a state's files in the order of ranks."""
    return [STATE_FILE] if parts == 1 else [f"state-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]


def write_part(folder: Path, part: Fragments, rank: int, world: int) -> str:
    """Write a rank's part to its file, flush it to disk, and return the file's SHA-256.

    Raises OSError or SafetensorError if the file cannot be written.
    """
    file = folder / part_files(world)[rank]
    tensors, offsets = dict[str, Tensor](), {}
    for name, (data, start, shape) in part.items():
        if len(data):
            complete = len(data) == math.prod(shape)
            tensors[name] = data.view(shape) if complete else data
            offsets[name] = {"saved_offsets": [0] * len(shape) if complete else [start]}
    save_file(tensors, file, {_OFFSETS: json.dumps(offsets)})
    sync_to_disk(file)
    return sha256(file)


def tabulate(folder: Path, shapes: dict[str, Shape], parts: int) -> Table:
    """Return the table of the files that the ranks have written to `folder`. `shapes`: shapes of all tensors in the
    state.

    Raises:
        UserError: a file is missing, or an element of a tensor occurs in no file or in two files.
    """
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    for number, file in enumerate(part_files(parts)):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name, offsets in json.loads(opened.metadata()[_OFFSETS]).items():
                    start = sum(offsets["saved_offsets"])  # a flat piece has one offset; a complete tensor has zeros
                    found[name].append((start, number, math.prod(opened.get_slice(name).get_shape())))
        except (OSError, SafetensorError) as error:
            raise _unseen(folder / file, number, error) from None
    for name, pieces in found.items():
        at = 0
        for start, _, count in [*sorted(pieces), (math.prod(shapes[name]), 0, 0)]:
            if start != at:
                missing = f"no rank's part contains elements {at} to {start - 1} of {name}"
                twice = f"some elements of {name} occur in the parts of more than one rank"
                raise UserError(f"checkpoint {folder}: {missing if start > at else twice}")
            at += count
    return Table(parts, shapes, {name: [(i, n) for _, i, n in sorted(pieces)] for name, pieces in found.items()})


@dataclass(frozen=True)
class _Written:
    """The written files of a state. Two objects are equal if the headers of their files are equal."""

    headers: str  # SHA-256 of the headers of all files
    folder: Path = field(compare=False)
    shapes: dict[str, Shape] = field(compare=False)
    parts: int = field(compare=False)


# cached, because all saves of a run are split in the same way, and building the table for many ranks takes seconds
@lru_cache(maxsize=1)
def _table(written: _Written) -> str:
    return json.dumps(asdict(tabulate(written.folder, written.shapes, written.parts)))


def write_table(folder: Path, shapes: dict[str, Shape], parts: int) -> str:
    """Write the table of the files in `folder` and return its file's SHA-256. See `tabulate` for the arguments and
    errors."""
    headers = hashlib.sha256(json.dumps(shapes).encode())
    for number, file in enumerate(part_files(parts)):
        try:
            with open_regular(folder / file) as opened:
                headers.update(opened.read(int.from_bytes(opened.read(8), "little")))
        except OSError as error:
            raise _unseen(folder / file, number, error) from None
    text = _table(_Written(headers.hexdigest(), folder, shapes, parts))
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    return sha256(folder / TABLE_FILE)


def _unseen(file: Path, rank: int, error: Exception) -> UserError:
    return UserError(
        f"{file}, which rank {rank} wrote, cannot be read by rank 0 ({error}): run.dir must be on a file system "
        "shared by all nodes"
    )


def sha256(path: Path) -> str:
    """Return a file's SHA-256. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(path: Path, file: str, error: object) -> UserError:
    """Return the error for a damaged file of a checkpoint."""
    if isinstance(error, ValidationError):  # ValidationErrors have several lines
        first = error.errors()[0]
        error = ": ".join([".".join(map(str, first["loc"])), first["msg"]] if first["loc"] else [first["msg"]])
    reason = " ".join(str(error).split())[:200]
    return UserError(f"checkpoint {path}: {file} is damaged ({reason}); {_remedy(path)}")


def _remedy(path: Path) -> str:
    """Return what to do if the checkpoint at `path` cannot be used."""
    older = max((other.name for other in path.parent.glob("step-*") if other.name < path.name), default=None)
    aim = f"use {older}" if older else "begin again, because there is no older checkpoint"
    return f"remove the folder to {aim}"


def check(path: Path, file: str, sums: dict[str, str]) -> None:
    """Raise UserError if a file is missing, or if its checksum in `sums` (SHA-256 by file name) is missing or
    differs."""
    try:
        found = sha256(path / file)
        if file not in sums:
            raise OSError("its checksum is missing from state.json, so it may be from another step")
        if sums[file] != found:
            raise OSError("its checksum differs from the one in state.json")
    except OSError as error:
        raise damaged(path, file, error) from None


def read_table(path: Path) -> Table:
    """Return a checkpoint's table. Raises UserError if it is damaged."""
    try:
        with open_regular(path / TABLE_FILE) as file:
            table = TypeAdapter(Table).validate_json(file.read(), strict=True)
        for name, shape in table.shapes.items():
            pieces = table.pieces[name]
            if sum(count for _, count in pieces) != math.prod(shape) or any(i >= table.parts for i, _ in pieces):
                raise ValueError(f"the pieces of {name} are incomplete")
    except (OSError, ValueError, KeyError) as error:
        raise damaged(path, TABLE_FILE, error) from None
    return table


def _open(path: Path, file: str) -> Any:
    """Return an opened file of a checkpoint. Raises UserError if it is damaged."""
    try:
        open_regular(path / file).close()  # raises an error for a pipe, which safetensors would wait for
        return safe_open(path / file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise damaged(path, file, error) from None


class State:
    """Reader of a checkpoint's tensors and of slices of them. Files are opened on first use."""

    def __init__(self, path: Path, table: Table) -> None:
        """Create the reader of a checkpoint with this table."""
        self._path, self._opened = path, dict[str, Any]()
        self.shapes, self._pieces, self._files = table.shapes, table.pieces, part_files(table.parts)

    def whole(self, name: str) -> Tensor:
        """Return a complete tensor: float32, in the tensor's shape. Raises the same errors as `read`."""
        return self.read(name, 0, math.prod(self._shape(name))).view(self.shapes[name])

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return the elements [start, start + count) of a flattened tensor, float32 [count].

        Raises:
            UserError: the tensor does not exist, an element is not finite, or a piece is damaged or not float32.
        """
        self._shape(name)
        found, stop = [], start + count  # `start` and `stop` are relative to the first element of the current piece
        for number, length in self._pieces[name]:
            if max(0, start) < min(length, stop):
                found.append(self._piece(number, name, length)[max(0, start) : stop])
            start, stop = start - length, stop - length
        tensor = found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])
        if not tensor.isfinite().all():
            raise UserError(f"checkpoint {self._path}: {name} is not finite; {_remedy(self._path)}")
        return tensor

    def check(self, shapes: dict[str, Shape]) -> None:
        """Raise UserError if a tensor of `shapes` is missing from the state or has a different shape."""
        for name, shape in shapes.items():
            if (found := self._shape(name)) != shape:
                raise UserError(
                    f"checkpoint {self._path}: {name} has the shape {list(found)}, but the model needs {list(shape)}"
                )

    def _shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise UserError(f"checkpoint {self._path}: has no tensor {name}; check that the model config fits")
        return self.shapes[name]

    def _piece(self, number: int, name: str, length: int) -> Tensor:
        file = self._files[number]
        try:
            tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise damaged(self._path, file, error) from None
        if (tensor.dtype, tensor.numel()) != (torch.float32, length):
            raise damaged(self._path, file, f"its piece of {name} is {tensor.dtype} {list(tensor.shape)}")
        return tensor.flatten()

    def _file(self, file: str) -> Any:
        if file not in self._opened:
            self._opened[file] = _open(self._path, file)
        return self._opened[file]
