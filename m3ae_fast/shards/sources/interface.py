"""Records, the interface of sources for shards: samples that are read by number."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.index import MAX_IMAGE_BYTES
from m3ae_fast.shards.problem_counts import Tally


@dataclass(frozen=True)
class Record:
    """A sample to be written to a shard."""

    image: bytes | None = None  # an image file in any format that `decode_image` reads
    caption: str | None = None  # blank means that there is none
    label: int | None = None
    about: dict[str, Any] = field(default_factory=dict)  # fields of the sample's json
    members: dict[str, bytes] = field(default_factory=dict)  # further files of the sample, by suffix


class Records(ABC):
    """A source of rows, each of which consists of one or more samples. Samples can be read in any order, in several
    processes."""

    classes: Sequence[str] | None = None  # names of the classes by label
    identity: dict[str, Any]  # JSON data that differ for different inputs
    notes: Sequence[str] = ()  # notes for the user about splits and classes
    unlabelled: str = ""  # reason why samples have no label, if it is known

    def __init__(self, counts: dict[str, np.ndarray]) -> None:
        """Initialise the records with the number of samples of each row, int64 [rows], by split."""
        self.ignored = Tally()  # files or columns that are not read
        self._starts = {split: np.concatenate(([0], np.cumsum(each))) for split, each in counts.items()}
        self.splits = {split: int(starts[-1]) for split, starts in self._starts.items()}  # number of samples

    @abstractmethod
    def name(self, split: str, number: int) -> str:
        """Return the name of a sample for messages."""

    @abstractmethod
    def read(self, split: str, number: int) -> Record:
        """Return a sample. Raises BadSample if it cannot be used."""

    def classes_of(self, split: str) -> list[str | None] | None:
        """Return a list with the name of each sample's class, or None for a sample without a class. Return None instead
        of the list if the classes are unknown until all samples have been read."""
        return None

    def class_counts(self, split: str) -> Counter[str] | None:
        """Return the number of samples of each class by name; None if it is unknown."""
        classes = self.classes_of(split)
        return None if classes is None else Counter(name for name in classes if name is not None)

    def place(self, split: str, number: int) -> tuple[int, int]:
        """Return the row of a sample, and its number within the row."""
        starts = self._starts[split]
        row = int(np.searchsorted(starts, number, side="right")) - 1
        return row, number - int(starts[row])

    def rows(self, split: str) -> int:
        """Return the number of rows."""
        return len(self._starts[split]) - 1

    def values(self, split: str, field: str) -> list[Any]:
        """Return the value of a field for each sample; the value is None for a sample without this field. `field`:
        "json.NAME" or NAME for a field of the sample's json or for a column, or "folder" for the folder of the image.
        Raises UserError if samples of this source have no fields."""
        raise UserError(f"--group {field}: an HDF5 file has no such field")

    def fields(self, split: str) -> list[str]:
        """Return the names that `values` accepts, as far as they are known."""
        return []

    def images(self, split: str) -> np.ndarray:
        """Return image numbers, int64 [samples]: samples of the same image have the same number. By default, the
        samples of a row have the same image."""
        starts = self._starts[split]
        return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def to_int(value: Any) -> int | None:
    """Return a label as a plain int; None for None. Raises BadSample if it is not an integer."""
    if value is None:
        return None
    try:
        number = int(value)
        if isinstance(value, float | np.floating) and number != value:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise BadSample(f"the label {value!r} is not an integer") from None


def captions_of(value: Any) -> list[str]:
    """Return the captions in a value: a text itself, or the non-blank texts of a list. The result is empty for None and
    NaN. Raises ValueError for other values, and for bytes that are not UTF-8."""
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
            raise ValueError(f"is a list that contains {_kind(item)}, not text or a list of texts")
    texts = [_text(item) for item in value if not _is_none(item)]
    return [text for text in texts if text.strip()]


def count_samples(value: Any) -> int:
    """Return the number of samples of a row with these captions: at least one, even if the captions are invalid."""
    try:
        return max(1, len(captions_of(value)))
    except ValueError:
        return 1


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _text(value: str | bytes) -> str:
    """Return a text as str. Raises ValueError if it is not valid Unicode."""
    try:
        return value.encode().decode() if isinstance(value, str) else value.decode()
    except UnicodeError:
        raise ValueError("is not UTF-8") from None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:60]!r})"


def caption_of_row(value: Any, index: int) -> str:
    """Return the caption of sample number `index` of a row; blank if the row has no caption. Raises BadSample if
    `value` is neither text nor a list of texts, or is not UTF-8."""
    try:
        return (captions_of(value) or [""])[index]
    except ValueError as error:
        raise BadSample(f"the caption {error}") from None


def read_file(path: str) -> bytes:
    """Return the bytes of a file. Raises BadSample if it cannot be read, is a pipe or a device, or exceeds the size
    limit of images."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_BYTES:
                raise BadSample(f"{path}: has {size:,} bytes, but at most {MAX_IMAGE_BYTES:,} are allowed")
            return file.read()
    except OSError as error:
        raise BadSample(f"{path}: {error.strerror}" if error.strerror else str(error)) from None
