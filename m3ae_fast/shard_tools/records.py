"""What shards are made of: records that are read by number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.data.index import MAX_IMAGE_BYTES
from m3ae_fast.regular_file import open_regular
from m3ae_fast.shard_tools.captions import captions_of


@dataclass(frozen=True)
class Record:
    """One sample."""

    image: bytes | None = None  # a file in any format that `decode_image` knows
    caption: str | None = None  # blank: none
    label: int | None = None
    about: dict[str, Any] = field(default_factory=dict)  # for the sample's json
    members: dict[str, bytes] = field(default_factory=dict)  # more of its files, by suffix


class Records(Protocol):
    """An input that can be read in any order, in several processes."""

    splits: dict[str, int]  # samples of each
    classes: Sequence[str] | None  # names of the labels
    identity: dict[str, Any]  # JSON; differs where the input does

    def name(self, split: str, number: int) -> str:
        """Return what the user calls a sample, for messages."""

    def read(self, split: str, number: int) -> Record:
        """Return a sample. Raises BadSample if it cannot be used."""

    def images(self, split: str) -> np.ndarray:
        """Return int64 [samples]: samples of one image have the same number, as far as the input tells."""


class Rows:
    """Records in rows, each of which gives some samples: those of a table with lists of captions, or shards."""

    def __init__(self, counts: dict[str, np.ndarray]) -> None:
        """Take the number of samples of each row, by split."""
        self._starts = {split: np.concatenate(([0], np.cumsum(each))) for split, each in counts.items()}
        self.splits = {split: int(starts[-1]) for split, starts in self._starts.items()}

    def place(self, split: str, number: int) -> tuple[int, int]:
        """Return the row of a sample, and which of the row's samples it is."""
        starts = self._starts[split]
        row = int(np.searchsorted(starts, number, side="right")) - 1
        return row, number - int(starts[row])

    def images(self, split: str) -> np.ndarray:
        """See `Records`: the samples of a row are of one image."""
        starts = self._starts[split]
        return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def to_int(value: Any) -> int | None:
    """Return a label as a plain int. Raises BadSample if it is not a number."""
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise BadSample(f"the label {value!r} is not a number") from None


def caption_of_row(value: Any, turn: int) -> str:
    """Return the caption of a row's sample `turn`, blank if it has none. Raises BadSample if `value` is no caption."""
    try:
        return (captions_of(value) or [""])[turn]
    except ValueError as error:
        raise BadSample(f"the caption {error}") from None


def read_file(path: str) -> bytes:
    """Read a file. Raises BadSample if it cannot be read, is a pipe or a device, or is larger than images are."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_BYTES:
                raise BadSample(f"{path}: has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            return file.read()
    except OSError as error:
        raise BadSample(f"{path}: {error.strerror}" if error.strerror else str(error)) from None
