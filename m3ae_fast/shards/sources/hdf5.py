"""Records from the HDF5 files of the official M3AE code (github.com/young-geng/m3ae_public, m3ae/data.py).

The dataset `jpg` contains the image files as variable-length uint8, and `caption` contains their captions. The file of
ImageNet has `train_jpg`, `train_labels`, `val_jpg` and `val_labels`; a file of unpaired text has `text`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.interface import Record, Records, caption_of_row, count_samples, to_int

FIELDS = "jpg with caption, train_jpg with train_labels, val_jpg with val_labels, or text"


class _Fields(NamedTuple):
    """Names of the HDF5 datasets of a split."""

    image: str | None
    caption: str | None
    label: str | None


_SPLITS = {
    "train": (_Fields("jpg", "caption", None), _Fields("train_jpg", None, "train_labels"), _Fields(None, "text", None)),
    "val": (_Fields("val_jpg", None, "val_labels"),),
}


class Hdf5(Records):
    """Records of an HDF5 file. A row with several captions (a row of a dataset [N, K], or a list of variable length)
    gives one sample per caption. Raises UserError if h5py is not installed, the file is not HDF5, or it does not
    contain the HDF5 datasets of the official code."""

    def __init__(self, path: Path, _: SourceOptions) -> None:
        h5py = library("h5py", str(path))
        self.path = path
        self._open: Any = None
        self._fields: dict[str, _Fields] = {}
        counts: dict[str, np.ndarray] = {}
        try:
            open_regular(path).close()  # HDF5 would block on a pipe
            with h5py.File(path, "r") as file:
                names = list(file)
                for split, layouts in _SPLITS.items():
                    for layout in layouts:
                        fields = _Fields(*(name if name in names else None for name in layout))
                        if (layout.image or layout.caption) in names and split not in self._fields:
                            self._fields[split] = fields
                            counts[split] = self._count_samples(file, fields)
        except OSError as error:
            reason = error.strerror or "it is not an HDF5 file, or is damaged"
            raise UserError(f"{path}: cannot be read ({reason})") from None
        if not self._fields:
            raise UserError(f"{path}: has {', '.join(names) or 'no data'}, but needs {FIELDS}")
        super().__init__(counts)
        found = path.stat()
        self.identity = {
            "kind": "hdf5",
            "bytes": found.st_size,
            "changed_ns": found.st_mtime_ns,
            "fields": {k: list(v) for k, v in self._fields.items()},
        }

    def _count_samples(self, file: Any, fields: _Fields) -> np.ndarray:
        """Return the number of samples of each row: int64 [rows]."""
        data = {name: self._data_set(file, name) for name in fields if name}
        lengths = {name: len(values) if values.shape else 0 for name, values in data.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise UserError(f"{self.path}: its fields have different lengths ({listed})")
        counts = np.ones(next(iter(lengths.values())), dtype=np.int64)
        if fields.caption and _holds_several(data[fields.caption]):
            counts[:] = [count_samples(_as_text(value)) for value in data[fields.caption]]
        return counts

    def _data_set(self, file: Any, name: str) -> Any:
        """Return the HDF5 dataset with this name. Raises UserError if it is a broken link or a group."""
        try:
            found = file[name]
        except (KeyError, OSError, RuntimeError):  # a link to itself raises a RuntimeError
            raise UserError(f"{self.path}: {name} is a broken link") from None
        if not hasattr(found, "shape"):
            raise UserError(f"{self.path}: {name} is a group, not a dataset")
        return found

    def name(self, split: str, number: int) -> str:
        fields = self._fields[split]
        return f"{fields.image or fields.caption} {self.place(split, number)[0]}"

    def read(self, split: str, number: int) -> Record:
        if self._open is None:  # each process opens the file itself
            import h5py

            self._open = h5py.File(self.path, "r")
        fields, (row, index) = self._fields[split], self.place(split, number)
        try:
            image, caption, label = (self._open[name][row] if name else None for name in fields)
        except OSError as error:
            raise BadSample(f"the file is damaged ({error})") from None
        text = caption_of_row(_as_text(caption), index) if fields.caption else None
        return Record(None if image is None else _bytes(image), text, to_int(label))


def _holds_several(captions: Any) -> bool:
    """Return whether each row of an HDF5 dataset is a list of texts; a row of uint8 is a single text."""
    import h5py

    inner = h5py.check_vlen_dtype(captions.dtype) or captions.dtype
    return inner != np.uint8 and (captions.ndim > 1 or inner is not captions.dtype)


def _as_text(value: Any) -> Any:
    """Return a caption or a list of captions, with rows of uint8 converted to bytes."""
    if not isinstance(value, np.ndarray):
        return value
    return value.tobytes() if value.dtype == np.uint8 else [_as_text(item) for item in value]


def _bytes(value: Any) -> bytes:
    """Return the bytes of variable-length uint8 or of a string, as returned by h5py."""
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8).tobytes()
