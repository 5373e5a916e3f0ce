"""What shards are made of: records that are read by number."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.index import MAX_IMAGE_BYTES
from m3ae_fast.shards.problem_counts import Tally


@dataclass(frozen=True)
class Record:
    """One sample."""

    image: bytes | None = None  # a file in any format that `decode_image` knows
    caption: str | None = None  # blank: none
    label: int | None = None
    about: dict[str, Any] = field(default_factory=dict)  # for the sample's json
    members: dict[str, bytes] = field(default_factory=dict)  # more of its files, by suffix


class Records(ABC):
    """An input of rows, each of which gives some samples, that can be read in any order, in several processes."""

    classes: Sequence[str] | None = None  # names of the labels
    identity: dict[str, Any]  # JSON; differs where the input does
    notes: Sequence[str] = ()  # what the user should know about splits and classes

    def __init__(self, counts: dict[str, np.ndarray]) -> None:
        """Take the number of samples of each row, by split."""
        self.ignored = Tally()  # files or columns that are not read
        self._starts = {split: np.concatenate(([0], np.cumsum(each))) for split, each in counts.items()}
        self.splits = {split: int(starts[-1]) for split, starts in self._starts.items()}  # samples of each

    @abstractmethod
    def name(self, split: str, number: int) -> str:
        """Return what the user calls a sample, for messages."""

    @abstractmethod
    def read(self, split: str, number: int) -> Record:
        """Return a sample. Raises BadSample if it cannot be used."""

    def class_counts(self, split: str) -> Counter[str] | None:
        """Return the samples of each class, by its name; None if that is not known before all samples are read."""
        return None

    def place(self, split: str, number: int) -> tuple[int, int]:
        """Return the row of a sample, and which of the row's samples it is."""
        starts = self._starts[split]
        row = int(np.searchsorted(starts, number, side="right")) - 1
        return row, number - int(starts[row])

    def images(self, split: str) -> np.ndarray:
        """Return int64 [samples]: one number for all samples of an image, as far as the input tells: of a row."""
        starts = self._starts[split]
        return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def to_int(value: Any) -> int | None:
    """Return a label as a plain int. Raises BadSample if it is not a number."""
    if value is None:
        return None
    try:
        number = int(value)
        if isinstance(value, float | np.floating) and number != value:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise BadSample(f"the label {value!r} is not a whole number") from None


def captions_of(value: Any) -> list[str]:
    """Return the captions of a value: of a text one, of a list of texts those that are not blank, of None and NaN none.
    Raises ValueError if it is something else, or bytes that are not UTF-8."""
    if _is_none(value):
        return []
    if isinstance(value, (str, bytes)):
        return [_text(value)]
    if isinstance(value, np.ndarray):
        value = np.atleast_1d(value).tolist()
    if not isinstance(value, Sequence):
        raise ValueError(f"is {_kind(value)}, not text or a list of texts")
    for item in value:
        if not isinstance(item, (str, bytes)) and not _is_none(item):
            raise ValueError(f"is a list with {_kind(item)} in it, not text or a list of texts")
    texts = [_text(item) for item in value if not _is_none(item)]
    return [text for text in texts if text.strip()]


def count_samples(value: Any) -> int:
    """Return how many samples a row with these captions gives: at least one, also where they are refused."""
    try:
        return max(1, len(captions_of(value)))
    except ValueError:
        return 1


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _text(value: str | bytes) -> str:
    """Raise ValueError if it is no Unicode."""
    try:
        return value.encode().decode() if isinstance(value, str) else value.decode()
    except UnicodeError:
        raise ValueError("is not UTF-8") from None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:60]!r})"


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
