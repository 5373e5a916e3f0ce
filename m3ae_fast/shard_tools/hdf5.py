"""The HDF5 files of the official M3AE code (github.com/young-geng/m3ae_public, m3ae/data.py) as a source.

`jpg` holds each image file as variable-length uint8, `caption` its text; ImageNet's has `train_jpg`, `train_labels`,
`val_jpg`, `val_labels`; a file of unpaired text has `text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.errors import UserError
from m3ae_fast.shard_tools.source import Record, to_int

FIELDS = "jpg with caption, train_jpg with train_labels, val_jpg with val_labels, or text"


class _Fields(NamedTuple):
    """Names of a split's data sets."""

    image: str | None
    caption: str | None
    label: str | None


_SPLITS = {
    "train": (_Fields("jpg", "caption", None), _Fields("train_jpg", None, "train_labels"), _Fields(None, "text", None)),
    "val": (_Fields("val_jpg", None, "val_labels"),),
}


class Hdf5:
    """See `source.Source`.

    Raises:
        UserError: h5py is not installed, or the file is not HDF5 or lacks the fields.
    """

    classes: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError:
            raise UserError("from-hdf5: needs h5py; pip install 'm3ae-fast[hdf5]'") from None
        self.path = path
        self._open: Any = None
        self._fields: dict[str, _Fields] = {}
        self.splits: dict[str, int] = {}
        try:
            with h5py.File(path, "r") as file:
                names = [name for name in file if isinstance(file[name], h5py.Dataset)]
                for split, layouts in _SPLITS.items():
                    for layout in layouts:
                        fields = _Fields(*(name if name in names else None for name in layout))
                        if (layout.image or layout.caption) in names and split not in self.splits:
                            self._fields[split] = fields
                            self.splits[split] = self._length(file, fields)
        except OSError as error:
            reason = error.strerror or "it is not an HDF5 file, or a damaged one"
            raise UserError(f"{path}: cannot be read ({reason})") from None
        if not self.splits:
            raise UserError(f"{path}: has {', '.join(names) or 'no data'}, but needs {FIELDS}")
        size = path.stat().st_size
        self.identity: dict[str, Any] = {
            "kind": "hdf5",
            "bytes": size,
            "fields": {k: list(v) for k, v in self._fields.items()},
        }

    def _length(self, file: Any, fields: _Fields) -> int:
        lengths = {name: len(file[name]) if file[name].shape else 0 for name in fields if name}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise UserError(f"{self.path}: its fields have different lengths ({told})")
        return next(iter(lengths.values()))

    def read(self, split: str, number: int) -> Record:
        if self._open is None:  # each process has a file of its own
            import h5py

            self._open = h5py.File(self.path, "r")
        fields = self._fields[split]
        try:
            image, caption, label = (self._open[name][number] if name else None for name in fields)
        except OSError as error:
            raise BadSample(f"the file is damaged ({error})") from None
        text = None if caption is None else _bytes(caption).decode("utf-8", "replace")
        return Record(None if image is None else _bytes(image), text, to_int(label))


def _bytes(value: Any) -> bytes:
    """Variable-length uint8 or a string, as h5py gives them."""
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8).tobytes()
