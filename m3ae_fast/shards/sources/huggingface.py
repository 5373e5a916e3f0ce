"""Records from a Hugging Face dataset, on disk or by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import hub_answers
from m3ae_fast.base.libraries import library
from m3ae_fast.base.progress import track
from m3ae_fast.images.bands import write_npy
from m3ae_fast.shards.duplicate_images import number_same, sketch
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.problem_counts import UNREAD
from m3ae_fast.shards.sources.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    NO_CAPTIONS,
    choose_column,
)
from m3ae_fast.shards.sources.interface import Record, Records, caption_of_row, count_samples, read_file, to_int

_AT_A_TIME = 1000  # number of rows that are read at a time


class NotLoaded(UserError):
    """Raised if a dataset does not exist or cannot be loaded."""


class HuggingFace(Records):
    """Records of a dataset: a folder written by `save_to_disk`, a folder of data files, or a name on the Hub. A row
    with a list of captions gives one sample per caption. `ignored` counts columns that are not read.

    Raises:
        UserError: `datasets` is not installed, the dataset has neither images nor captions, the split or a named column
            does not exist, or the columns that are read differ between its splits.
        NotLoaded: the dataset does not exist or cannot be loaded.
    """

    def __init__(self, name: str, options: SourceOptions) -> None:
        datasets = library("datasets", "a Hugging Face dataset")
        data = _load(datasets, name, options.subset)
        if (split := options.split) is not None:
            if split not in data:
                raise UserError(f"--split {split}: {name} has only the splits {', '.join(data)}")
            data = {split: data[split]}
        first = next(iter(data.values()))
        self.image, self.caption, self.label = read = _columns(
            first.features, (options.image_column, options.caption_column, options.label_column), name
        )
        for key, rows in data.items():
            if odd := next((c for c in read if c and rows.features.get(c) != first.features[c]), None):
                raise UserError(
                    f"{name}: the type of the column {odd} differs between {key} and {next(iter(data))}; choose one of "
                    "them with --split"
                )
        self.classes = getattr(first.features[self.label], "names", None) if self.label else None
        images = first.features[self.image] if self.image else None
        # dtype of the values if images are arrays [H, W] or [H, W, C]
        self._dtype: str = getattr(images, "dtype", "") if _is_array(images) else ""
        self._data: dict[str, Any] = {}
        self._whole = data  # the splits with all columns, including those that are not read
        for key, rows in data.items():
            rows = rows.select_columns([column for column in (self.image, self.caption, self.label) if column])
            self._data[key] = rows
            if self.image and not self._dtype:
                self._data[key] = rows.cast_column(self.image, datasets.Image(decode=False))
        super().__init__({key: _samples(rows, self.caption) for key, rows in self._data.items()})
        for column in sorted(first.features.keys() - {*read}):
            self.ignored.add(UNREAD, f"{column}: {first.features[column]}")
        self.identity = {
            "kind": "huggingface",
            "name": name,
            "columns": [self.image, self.caption, self.label],
            "fingerprints": {key: rows._fingerprint for key, rows in data.items()},
        }

    def name(self, split: str, number: int) -> str:
        return f"{split} row {self.place(split, number)[0]}"

    def read(self, split: str, number: int) -> Record:
        row_number, index = self.place(split, number)
        row = self._data[split][row_number]
        caption = caption_of_row(row[self.caption], index) if self.caption else None
        label = to_int(row[self.label]) if self.label else None
        if label is not None and label < 0:  # test splits whose labels are secret contain -1
            label = None
        about = {"class_name": self.classes[label]} if self.classes and label is not None else {}
        image = None if self.image is None else row[self.image]
        if self._dtype and image is not None:
            image = write_npy(np.asarray(image, dtype=self._dtype))
        return Record(_image(image), caption, label, about)

    def classes_of(self, split: str) -> list[str | None]:
        rows = super().images(split).tolist()
        if not self.label:
            return [None] * len(rows)
        labels = [label if isinstance(label, int) and label >= 0 else None for label in self._data[split][self.label]]
        names = [None if label is None else self.classes[label] if self.classes else str(label) for label in labels]
        return [names[row] for row in rows]

    def values(self, split: str, field: str) -> list[Any]:
        rows, name = self._whole[split], field.removeprefix("json.")
        if name not in rows.features:
            raise UserError(f"--group {field}: the dataset has only the columns {', '.join(rows.features)}")
        values = rows.select_columns([name]).with_format("arrow")[name].to_pylist()
        return [values[row] for row in super().images(split).tolist()]

    def images(self, split: str) -> np.ndarray:
        """Return image numbers; see `interface.Records`. Rows whose image has the same bytes or the same path count as
        one image."""
        rows_S = super().images(split)
        if not self.image or self._dtype:  # duplicates are not detected for arrays
            return rows_S
        data = self._data[split].select_columns([self.image]).with_format("arrow")
        batches = track(data.iter(_AT_A_TIME), "looking for duplicate images", -(-len(data) // _AT_A_TIME))
        sketches = [_sketch(value) for batch in batches for value in batch.column(0)]

        def whole(row: int) -> bytes:
            value = data[row].column(0)[0].as_py()
            return hashlib.sha256((value if isinstance(value, bytes) else value["bytes"]) or b"").digest()

        # a row without an image has no duplicates
        return number_same(len(data), [lambda row: sketches[row] or row, whole])[rows_S]


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the `datasets` library."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _load(datasets: Any, name: str, subset: str | None) -> dict[str, Any]:
    """Return the splits of a dataset, by name. Raises NotLoaded if it cannot be loaded."""
    try:
        if not (Path(name).exists() or _downloaded(name) or hub_answers(name, "dataset")):
            raise ConnectionError("it is not a folder, and the Hugging Face Hub does not respond")
        data = datasets.load_from_disk(name) if is_saved_dataset(Path(name)) else datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises many kinds of errors, from files and from the network
        raise NotLoaded(f"{name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return dict(data) if isinstance(data, dict) else {"train": data}


def _downloaded(name: str) -> bool:
    """Return whether a dataset may be cached from an earlier download: offline mode is set, or its card is cached."""
    from huggingface_hub import constants, try_to_load_from_cache

    return constants.HF_HUB_OFFLINE or try_to_load_from_cache(name, "README.md", repo_type="dataset") is not None


def _is_array(feature: Any) -> bool:
    import datasets

    return isinstance(feature, (datasets.Array2D, datasets.Array3D))


def _columns(features: Any, named: tuple[str | None, str | None, str | None], where: str) -> list[str | None]:
    """Return the image, caption and label columns. Each is the column named by the user or, if none is named, a column
    that is detected by its type and a usual name; None if there is no such column. If only one column contains
    images, its name does not matter."""
    import datasets

    def kind(feature: Any) -> str:
        if isinstance(feature, datasets.Image) or _is_array(feature) or getattr(feature, "dtype", None) == "binary":
            return "image"
        if isinstance(feature, dict):  # an image in a .parquet that another library wrote
            return "image" if feature.keys() == {"bytes", "path"} else ""
        if isinstance(feature, datasets.ClassLabel):
            return "label"
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        if "string" in str(getattr(inner, "dtype", "")):
            return "caption"
        return "label" if str(getattr(feature, "dtype", "")).startswith(("int", "uint")) else ""

    found: list[str | None] = []
    usual = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "label": LABEL_COLUMNS}
    for (what, names), name in zip(usual.items(), named):
        if what == "caption" and name == NO_CAPTIONS:
            found.append(None)
            continue
        fitting = [column for column, feature in features.items() if kind(feature) == what]
        if name is not None and name in features and name not in fitting:
            raise UserError(f"--{what}-column {name}: has the type {features[name]}, which does not contain {what}s")
        if name is None and not any(column.lower() in names for column in fitting):
            only = fitting[0] if len(fitting) == 1 and what == "image" else None
            found.append(only)
        else:
            found.append(choose_column(fitting, name, names, f"--{what}-column", where))
    if found[0] is None and found[1] is None:
        columns = ", ".join(features)
        raise UserError(f"{where}: has the columns {columns}; choose one with --image-column or --caption-column")
    return found


def _samples(rows: Any, caption: str | None) -> np.ndarray:
    """Return the number of samples of each row: int64 [rows]."""
    if caption and not hasattr(rows.features[caption], "dtype"):  # each row has a list of captions
        values = rows.with_format("arrow")[caption]
        return np.array([count_samples(value) for value in values.to_pylist()], dtype=np.int64)
    return np.ones(len(rows), dtype=np.int64)


def _sketch(value: Any) -> Any:
    """Return cheap features of an image (a struct or binary of pyarrow): its path, or the sketch of the file.
    None if there is no image."""
    if value.is_valid and hasattr(value, "keys"):
        if not value["bytes"].is_valid:
            return value["path"].as_py()
        value = value["bytes"]
    if not value.is_valid:
        return None
    data = memoryview(value.as_buffer())
    return sketch(len(data), lambda length, start: data[start : start + length])


def _image(value: Any) -> bytes | None:
    """Return the bytes of an undecoded image's file; None if there is none. Raises BadSample if it cannot be read."""
    if value is None or isinstance(value, bytes):
        return value
    if value["bytes"] is None and value["path"] is not None:
        return read_file(value["path"])
    return value["bytes"]
