"""The tensors of a checkpoint: a file of each rank, and a table of what lies where.

    state.safetensors                    written by one rank: whole tensors by name
    state-00002-of-00004.safetensors     written by the second of four: flat pieces by name
    table.json                           which slices in which files make up each tensor, where several ranks wrote them

The files are in torch.distributed.checkpoint's safetensors format, as its HuggingFaceStorageReader reads. They are
not written by it: its writer serialises a part in memory, which holds it twice, and takes what it is given. Here the
table is made of the files as they are on the disk, and none is made where an element of a tensor is in no file or in
two. The table of its other format is a pickle, which runs what it names.
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

from m3ae_fast.base.atomic_file import to_disk
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.engine.fragments import Fragments

STATE_FILE, TABLE_FILE = "state.safetensors", "table.json"
ANY_PART = "state*.safetensors"
_OFFSETS = "DCP_SHARDING_INFO"  # in a part's header: {name: {"saved_offsets": [start]}} as JSON

Shape = tuple[int, ...]
_Size = Annotated[int, Field(ge=0)]


@dataclass
class Table:
    """What lies where."""

    parts: Annotated[int, Field(ge=1, lt=100_000)]  # files, of which the names have room for five digits
    shapes: dict[str, tuple[_Size, ...]]
    pieces: dict[str, list[tuple[_Size, _Size]]]  # of a tensor, in order: number of the file, elements


def part_files(parts: int) -> list[str]:
    """Return the names of a state's files, by rank."""
    return [STATE_FILE] if parts == 1 else [f"state-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]


def write_part(folder: Path, part: Fragments, rank: int, world: int) -> str:
    """Write a rank's part into its file, to the disk, and return the file's SHA-256.

    Raises OSError or SafetensorError if the disk refuses.
    """
    file = folder / part_files(world)[rank]
    if world == 1:
        save_file({name: data.view(shape) for name, (data, _, shape) in part.items()}, file)
    else:
        pieces = {name: piece for name, piece in part.items() if len(piece.data)}
        offsets = json.dumps({name: {"saved_offsets": [start]} for name, (_, start, _) in pieces.items()})
        save_file({name: data for name, (data, *_) in pieces.items()}, file, {_OFFSETS: offsets})
    to_disk(file)
    return sha256(file)


def tabulate(folder: Path, shapes: dict[str, Shape], parts: int) -> Table:
    """Return the table of the files that ranks have written into `folder`; `shapes`: of all tensors of the state.

    Raises:
        UserError: a file is not there, or an element of a tensor is in no file or in two.
    """
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    for number, file in enumerate(part_files(parts)):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name, offsets in json.loads(opened.metadata()[_OFFSETS]).items():
                    found[name].append((*offsets["saved_offsets"], number, *opened.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise _unseen(folder / file, number, error) from None
    for name, pieces in found.items():
        at = 0
        for start, _, count in [*sorted(pieces), (math.prod(shapes[name]), 0, 0)]:
            if start != at:
                missing = f"elements {at} to {start - 1} of {name} are in no rank's part"
                twice = f"some elements of {name} occur in the parts of more than one rank"
                raise UserError(f"checkpoint {folder}: {missing if start > at else twice}")
            at += count
    return Table(parts, shapes, {name: [(i, n) for _, i, n in sorted(pieces)] for name, pieces in found.items()})


@dataclass(frozen=True)
class _Written:
    """Files of which a table is made; equal where their headers are."""

    headers: str  # their SHA-256
    folder: Path = field(compare=False)
    shapes: dict[str, Shape] = field(compare=False)
    parts: int = field(compare=False)


@lru_cache(maxsize=1)  # one save is cut as the last: of many ranks, its table takes seconds
def _table(written: _Written) -> str:
    return json.dumps(asdict(tabulate(written.folder, written.shapes, written.parts)))


def write_table(folder: Path, shapes: dict[str, Shape], parts: int) -> str:
    """Write the table of the files in `folder` and return its file's SHA-256. Arguments and errors as of `tabulate`."""
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
        f"{file}, which rank {rank} wrote, cannot be read by rank 0 ({error}): is run.dir on a file system that all "
        "nodes see?"
    )


def sha256(path: Path) -> str:
    """Return a file's SHA-256. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(path: Path, file: str, error: object) -> UserError:
    """Return the error to raise where a file of a checkpoint is damaged."""
    if isinstance(error, ValidationError):  # of which each has several lines
        first = error.errors()[0]
        error = ": ".join([".".join(map(str, first["loc"])), first["msg"]] if first["loc"] else [first["msg"]])
    reason = " ".join(str(error).split())[:200]
    return UserError(f"checkpoint {path}: {file} is damaged ({reason}); remove the folder to use an older one")


def check(path: Path, file: str, sums: dict[str, str]) -> None:
    """Raise UserError if a file is missing, or if `sums` (SHA-256 by file name; empty: written before there were
    checksums) lack its checksum or have another one."""
    try:
        found = sha256(path / file)
        if sums and file not in sums:
            raise OSError("its checksum is missing from state.json, so it may be from another step")
        if sums and sums[file] != found:
            raise OSError("its checksum is not the one it was written with")
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
                raise ValueError(f"the pieces of {name} are not the whole of it")
    except (OSError, ValueError, KeyError) as error:
        raise damaged(path, TABLE_FILE, error) from None
    return table


class State:
    """Reads a checkpoint's tensors, wholly or in part. Files are opened when they are needed."""

    def __init__(self, path: Path, table: Table | None = None) -> None:
        """Open a state of several parts, or without a `table` of one. Raises UserError if it is damaged."""
        self._path, self._opened = path, dict[str, Any]()
        if table is None:
            whole = self._file(STATE_FILE)
            names = whole.keys()
            shapes = {name: tuple(whole.get_slice(name).get_shape()) for name in names}
            table = Table(1, shapes, {name: [(0, math.prod(shape))] for name, shape in shapes.items()})
        self.shapes, self._pieces, self._files = table.shapes, table.pieces, part_files(table.parts)

    def whole(self, name: str) -> Tensor:
        """Return a tensor. Errors as in `read`."""
        return self.read(name, 0, math.prod(self._shape(name))).view(self.shapes[name])

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements [start, start + count) of a tensor, 1-D.

        Raises:
            UserError: there is no such tensor, one of the elements is not finite, or a file is damaged.
        """
        self._shape(name)
        found, stop = [], start + count  # counted from each piece's first element
        for number, length in self._pieces[name]:
            if max(0, start) < min(length, stop):
                found.append(self._piece(number, name, length)[max(0, start) : stop])
            start, stop = start - length, stop - length
        tensor = found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])
        if not tensor.isfinite().all():
            raise UserError(f"checkpoint {self._path}: {name} is not finite; remove the folder to use an older one")
        return tensor

    def check(self, shapes: dict[str, Shape]) -> None:
        """Raise UserError if the state lacks a tensor of `shapes`, or has it with another shape or not in float32."""
        for name, shape in shapes.items():
            found, kind = self._shape(name), "F32"
            if self._files == [STATE_FILE]:  # a piece's is checked when it is read
                kind = self._file(STATE_FILE).get_slice(name).get_dtype()
            if found != shape or kind != "F32":
                raise UserError(
                    f"checkpoint {self._path}: {name} is {kind} {list(found)}, the model needs F32 {list(shape)}"
                )

    def _shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise UserError(f"checkpoint {self._path}: has no tensor {name}; is it of another model config?")
        return self.shapes[name]

    def _piece(self, number: int, name: str, length: int) -> Tensor:
        file = self._files[number]
        try:
            tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise damaged(self._path, file, error) from None
        if len(self._files) > 1 and (tensor.dtype, tensor.shape) != (torch.float32, (length,)):
            raise damaged(self._path, file, f"its piece of {name} is {tensor.dtype} {list(tensor.shape)}")
        return tensor.flatten()

    def _file(self, file: str) -> Any:
        if file not in self._opened:
            try:
                open_regular(self._path / file).close()  # safetensors would wait for a pipe
                self._opened[file] = safe_open(self._path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise damaged(self._path, file, error) from None
        return self._opened[file]
