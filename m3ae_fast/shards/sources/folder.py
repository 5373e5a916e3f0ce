"""Records from a folder of images, with splits, class folders, and captions from a table or from .txt files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular, read_json
from m3ae_fast.images.label_mask import read_mask
from m3ae_fast.images.suffixes import MASK_SUFFIX
from m3ae_fast.shards.duplicate_images import join, number_same, sketch
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.problem_counts import IGNORED, OUTSIDE, Tally
from m3ae_fast.shards.sources.caption_table import TableSample, samples_of_images
from m3ae_fast.shards.sources.columns import CAPTION_OPTION, IMAGE_OPTION
from m3ae_fast.shards.sources.folder_layout import TRAIN, Layout, listed, printable, understand
from m3ae_fast.shards.sources.image_files import find_images, find_texts, linked_and_empty, mask_of, missing_masks
from m3ae_fast.shards.sources.interface import Record, Records, read_file

_INSPECTED = 1000  # images that are inspected for the names of fields
# names of tables that the `datasets` library reads in every sub-folder of images
_METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))


class Folder(Records):
    """Records of the images in a folder and its sub-folders, sorted by path. `folder_layout` detects their splits and
    classes. With a table, each row contains the name of an image, its caption and other fields for the sample's json.
    Without a table, or for a table without captions, captions come from .txt files next to the images. The folder of
    masks may be inside `folder`. `ignored` counts ignored files.

    Raises:
        UserError: a folder cannot be listed; there is no image; no image has a mask although there is a folder of
            masks; the table cannot be read, lacks the column of captions or mostly names images that do not exist;
            split folders and other folders are mixed at one level; the folders do not fit the given classes; or a
            library that is needed to read the images is missing.
    """

    def __init__(self, folder: Path, options: SourceOptions) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder")
        self.folder, self._masks, table = str(folder), options.masks, options.captions
        columns = (options.image_column, options.caption_column)
        if table is None and columns != (None, None):
            option = IMAGE_OPTION if columns[0] is not None else CAPTION_OPTION
            raise UserError(
                f"{option}: names a column of a table, but {folder} has no table; specify one with --captions"
            )
        classes = _read_classes(options.classes) if isinstance(options.classes, Path) else options.classes
        files, images = find_images(folder, self._masks, options.flat)
        if table is None:
            _refuse_metadata(folder, files)
        directories = {os.path.dirname(path) for path in images}
        layout = understand(self.folder, directories, classes, options.flat)
        odd = [] if options.flat else linked_and_empty(self.folder, directories)
        self.classes, self.notes = layout.classes, [*layout.notes, *odd]
        _require_utf8(folder, self.classes or ())
        self._class_names = layout.names  # class of each directory
        self._labels = {name: label for label, name in enumerate(self.classes or ())}
        self._paths = [path for path in images if os.path.dirname(path) in layout.splits]
        self.unlabelled = _why_unlabelled(layout, self._paths)
        # indices into `self._paths`, by split
        rows: dict[str, list[int]] = {split: [] for split in layout.splits.values()}
        for number, path in enumerate(self._paths):
            rows[layout.splits[os.path.dirname(path)]].append(number)
        self._rows = {split: np.array(numbers) for split, numbers in rows.items()}
        self._samples, has_captions = [[TableSample()]] * len(self._paths), False  # samples of each image
        if table is not None:
            self._samples, has_captions, notes = samples_of_images(
                table, columns, folder, self._paths, has_splits=len(rows) > 1
            )
            self.notes += notes
        self._texts = None if has_captions else find_texts(images, files)  # None: captions come from the table
        counts = np.array([len(each) for each in self._samples])
        super().__init__({split: counts[rows] for split, rows in self._rows.items()})
        if self._masks is not None:
            self.notes += missing_masks(self._masks, self._paths)
        tables = [os.path.relpath(table, folder)] if table else []
        self.ignored = _ignored(files, {*images, *(self._texts or {}).values(), *tables})
        for path in images:
            if os.path.dirname(path) not in layout.splits:
                self.ignored.add(OUTSIDE, printable(path))
        self.identity = {"kind": "folder", **self._fingerprints()}
        if [*self.splits] != [TRAIN]:
            self.identity["splits"] = self.splits

    def name(self, split: str, number: int) -> str:
        return printable(self._paths[self._rows[split][self.place(split, number)[0]]])

    def read(self, split: str, number: int) -> Record:
        row, index = self.place(split, number)
        row = self._rows[split][row]
        path = self._paths[row]
        sample = self._samples[row][index]
        caption = sample.caption if self._texts is None else self._text(self._texts.get(path))
        name = self._class_names[os.path.dirname(path)]
        data, members = read_file(self._file(path)), {}
        if self._masks is not None and os.path.lexists(file := mask_of(self._masks, path)):
            members[MASK_SUFFIX] = read_file(str(file))
            read_mask(members[MASK_SUFFIX], data)
        return Record(data, caption, None if name is None else self._labels[name], self._about(row, sample), members)

    def _file(self, path: str) -> str:
        return os.path.join(self.folder, path)

    def _text(self, path: str | None) -> str | None:
        """Return the content of an image's .txt file; None if there is none."""
        if path is None:
            return None
        try:
            return read_file(self._file(path)).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample(f"{self._file(path)}: is not UTF-8; save it in UTF-8") from None

    def _about(self, row: int, sample: TableSample) -> dict[str, Any]:
        """Return the fields of a sample. `row`: index into the paths."""
        name = self._class_names[os.path.dirname(self._paths[row])]
        about = {"path": printable(self._paths[row])} | ({} if name is None else {"class_name": name})
        return about | json.loads(sample.fields or "{}")

    def values(self, split: str, field: str) -> list[Any]:
        rows = self._rows[split].tolist()
        if field == "folder":
            if field in self.fields(split)[1:]:
                raise UserError(
                    "--group folder: is the folder of the image, but the table has a column of this name; use "
                    "json.folder for the column, or rename the column"
                )
            return [os.path.dirname(self._paths[row]) for row in rows for _ in self._samples[row]]
        name = field.removeprefix("json.")
        return [self._about(row, sample).get(name) for row in rows for sample in self._samples[row]]

    def fields(self, split: str) -> list[str]:
        samples = ((row, sample) for row in self._rows[split][:_INSPECTED] for sample in self._samples[row])
        return ["folder", *dict.fromkeys(name for row, sample in samples for name in self._about(row, sample))]

    def classes_of(self, split: str) -> list[str | None]:
        names = [(self._class_names[os.path.dirname(self._paths[row])], row) for row in self._rows[split]]
        return [name for name, row in names for _ in self._samples[row]]

    def images(self, split: str) -> np.ndarray:
        """Return image numbers; see `interface.Records`. Files with equal bytes, or with names that differ only in the
        suffix, count as one image."""
        files = [self._file(self._paths[row]) for row in self._rows[split]]
        sketches = [_sketch(path) for path in track(files, "looking for duplicate images")]
        # an unreadable file has no duplicates
        contents_N = number_same(len(files), [lambda i: sketches[i] or i, lambda i: _digest(files[i])])
        stems: dict[str, int] = {}
        stems_N = np.array([stems.setdefault(os.path.splitext(path)[0], len(stems)) for path in files])
        return join(contents_N, stems_N)[super().images(split)]

    def _fingerprints(self) -> dict[str, str]:
        """Return fingerprints of the images, captions, classes and masks, by which changes of the user are
        detected."""
        images, captions = hashlib.sha256(), hashlib.sha256()
        for row, path in enumerate(self._paths):
            text = self._texts and self._texts.get(path)
            for sample in self._samples[row]:
                images.update(f"{path!r} {_stamp(self._file(path))}\n".encode())
                captions.update(f"{sample.caption!r} {text and _stamp(self._file(text))}{sample.fields}\n".encode())
        classes = hashlib.sha256(json.dumps(self.classes).encode())
        named = {"pictures": images, "captions": captions, "classes": classes}
        if self._masks is not None:
            stamps = [_stamp(str(mask_of(self._masks, path))) for path in self._paths]
            named["masks"] = hashlib.sha256(repr(stamps).encode())
        return {name: digest.hexdigest()[:16] for name, digest in named.items()}


def _read_classes(path: Path) -> list[str]:
    try:
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        return names
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from None


def _refuse_metadata(folder: Path, files: Sequence[str]) -> None:
    """Raise UserError if a sub-folder contains a table such as metadata.csv, which the `datasets` library would read,
    but this program does not."""
    if found := [path for path in files if "/" in path and os.path.basename(path).lower() in _METADATA]:
        raise UserError(
            f"{folder}: the tables of sub-folders ({listed(found)}) are not read; specify one table with --captions, "
            f"whose file names are relative to {folder}, or remove them"
        )


def _require_utf8(folder: Path, classes: Sequence[str]) -> None:
    """Raise UserError if the name of a class is not UTF-8."""
    if odd := next((name for name in classes if printable(name) != name), None):
        raise UserError(f"{folder}: the name of the class {os.fsencode(odd)!r} is not UTF-8; rename it, or use --flat")


def _why_unlabelled(layout: Layout, paths: Sequence[str]) -> str:
    """Return the reason why images have no classes; "" if they have classes."""
    if layout.classes is not None:
        return ""
    outside = next((printable(path) for path in paths if os.path.dirname(path) == layout.outside), None)
    if outside:
        return f"sub-folders are used as classes only if every image is in one, but {outside} is not"
    return "there are fewer than two sub-folders that could be classes"


def _ignored(files: Sequence[str], used: set[str]) -> Tally:
    """Return a tally of the files that are not used."""
    tally = Tally()
    for path in files:
        if path not in used:
            tally.add(IGNORED, printable(path))
    return tally


def _stamp(path: str) -> tuple[int, int] | None:
    """Return the size in bytes and the modification time in ns of a file; None if there is no such file, for example
    because `path` is a broken link."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _sketch(path: str) -> tuple[int, int] | None:
    """Return the sketch of a file; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            return sketch(os.fstat(file.fileno()).st_size, partial(os.pread, file.fileno()))
    except OSError:
        return None


def _digest(path: str) -> str:
    """Return a digest of a file's content, or its path if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except BadSample:
        return path
