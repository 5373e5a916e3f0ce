"""What can be converted: samples that are read by number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from m3ae_fast.batch.bad_samples import BadSample


@dataclass(frozen=True)
class Record:
    """One sample of a source."""

    image: bytes | None = None  # a file in any format that `decode_image` knows
    caption: str | None = None  # blank: none
    label: int | None = None
    about: dict[str, Any] = field(default_factory=dict)  # for the sample's json
    members: dict[str, bytes] = field(default_factory=dict)  # more of its files, by suffix


class Source(Protocol):
    """Samples that can be read in any order, in several processes."""

    splits: dict[str, int]  # samples of each
    classes: Sequence[str] | None  # names of the labels
    identity: dict[str, Any]  # JSON; differs where the input does

    def read(self, split: str, number: int) -> Record:
        """Raises BadSample where the sample cannot be used."""


def to_int(value: Any) -> int | None:
    """A label as a plain int. Raises BadSample where it is not a number."""
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise BadSample(f"the label {value!r} is not a number") from None


def read_file(path: str) -> bytes:
    """Raises BadSample where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadSample(f"{path}: {os.strerror(error.errno or 0)}") from None
