"""A folder of images as records: class folders, captions from a table or from .txt files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.batch.bad_samples import BadSample
from m3ae_fast.data.index import IMAGE_SUFFIXES
from m3ae_fast.errors import UserError
from m3ae_fast.progress import track
from m3ae_fast.regular_file import open_regular
from m3ae_fast.shard_tools.caption_table import Row, read_captions
from m3ae_fast.shard_tools.records import Record, Records, read_file
from m3ae_fast.shard_tools.same_images import join, middle, number_same
from m3ae_fast.shard_tools.tally import IGNORED, Tally

SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


class Folder(Records):
    """Images below a folder, in the order of their paths.

    Args:
        folder: where to look, in sub-folders too.
        captions: a table of captions with a row for each sample of an image; None: .txt files beside the images.
        columns: its columns of images and captions, None where they have usual names.
        classes: names of the classes, in the order of their labels; None: the sub-folders' names, sorted.
        flat: sub-folders are not classes.

    `ignored` counts files that are neither; `outside` is an image that is in no sub-folder where others are, or "".

    Raises:
        UserError: a folder cannot be listed, there is no image, or the table names some that are not there.
    """

    def __init__(
        self,
        folder: Path,
        captions: Path | None = None,
        columns: tuple[str | None, str | None] = (None, None),
        classes: Sequence[str] | None = None,
        flat: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder")
        self.folder = str(folder)
        files = sorted(_find(self.folder, flat))
        paths = [path for path in files if path.lower().endswith(SUFFIXES)]
        if not paths:
            raise UserError(f"{folder}: no image in it ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
        nested = any("/" in path for path in paths)
        self.outside = next((_printable(path) for path in paths if nested and "/" not in path), "")
        self.classes = None if flat else _classes(folder, paths, classes)
        self._labels = {name: label for label, name in enumerate(self.classes or ())}
        self._paths, self._has_table = paths, captions is not None
        self._captions: list[list[str | None]] = [[None]] * len(paths)  # of the table, by image
        if captions is not None:
            self._captions = _join(folder, paths, captions, read_captions(captions, *columns))
        super().__init__({"train": np.array([len(each) for each in self._captions])})
        self.ignored = _ignored(folder, files, paths, captions)
        self.identity = {"kind": "folder", **self._fingerprints()}

    def name(self, split: str, number: int) -> str:
        return _printable(self._paths[self.place(split, number)[0]])

    def read(self, split: str, number: int) -> Record:
        row, turn = self.place(split, number)
        path = os.path.join(self.folder, self._paths[row])
        caption = self._captions[row][turn] if self._has_table else self._beside(path)
        name = self._paths[row].partition("/")[0] if self.classes else None
        about: dict[str, Any] = {"path": _printable(self._paths[row])}
        if name is not None:
            about["class_name"] = name
        return Record(read_file(path), caption, None if name is None else self._labels[name], about)

    def images(self, split: str) -> np.ndarray:
        """See `records.Records`: files of equal bytes, or whose names differ in their suffix alone, are of one."""
        files = [os.path.join(self.folder, path) for path in self._paths]
        sketches = [_sketch(path) for path in track(files, "looking for the same image twice")]
        # a file that cannot be read is like no other
        contents_N = number_same(len(files), [lambda i: sketches[i] or i, lambda i: _digest(files[i])])
        stems: dict[str, int] = {}
        stems_N = np.array([stems.setdefault(os.path.splitext(path)[0], len(stems)) for path in files])
        return join(contents_N, stems_N)[super().images(split)]

    def _beside(self, path: str) -> str | None:
        """Return the text of the .txt beside an image, None if there is none."""
        beside = _text_file(path)
        if beside is None:
            return None
        try:
            return read_file(beside).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(f"{beside}: cannot be read ({error})") from None

    def _fingerprints(self) -> dict[str, str]:
        """Return fingerprints of pictures, captions and classes, which differ if the user changed them."""
        pictures, captions = hashlib.sha256(), hashlib.sha256()
        for path, own in zip(self._paths, self._captions):
            file = os.path.join(self.folder, path)
            beside = None if self._has_table else _text_file(file)
            for caption in own:
                pictures.update(f"{path!r} {_stamp(file)}\n".encode())
                captions.update(f"{caption!r} {beside and _stamp(beside)}\n".encode())
        classes = hashlib.sha256(json.dumps(self.classes).encode())
        named = {"pictures": pictures, "captions": captions, "classes": classes}
        return {name: digest.hexdigest()[:16] for name, digest in named.items()}


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _text_file(image: str) -> str | None:
    """Return NAME.txt or NAME.TXT beside NAME.jpg. A link to nothing counts too: it was meant to be a caption."""
    stem = os.path.splitext(image)[0]
    return next((stem + suffix for suffix in (".txt", ".TXT") if os.path.lexists(stem + suffix)), None)


def _stamp(path: str) -> tuple[int, int] | None:
    """Return size in bytes and modification time of a file; None if it is not there, such as the end of a link."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _sketch(path: str) -> tuple[int, bytes] | None:
    """Return size and middle of a file; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start, length = middle(size)
            return size, hashlib.sha256(os.pread(file.fileno(), length, start)).digest()
    except OSError:
        return None


def _digest(path: str) -> str:
    """Return what tells the content of a file from others; its path if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except BadSample:
        return path


def _find(folder: str, flat: bool) -> Iterator[str]:
    """Yield paths of files below `folder`, hidden ones left out. Links to folders are followed, but none twice within a
    class: two classes may be links to one folder, and a link may lead back. Raises UserError as `_refuse`."""
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real, below = os.path.realpath(parent), os.path.relpath(parent, folder)
        place = ("" if flat else below.partition("/")[0], real)
        if place in seen or (below != "." and real == os.path.realpath(folder)):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _ignored(folder: Path, files: Sequence[str], images: Sequence[str], table: Path | None) -> Tally:
    """Tally the files that are neither an image, nor a caption beside one, nor the table."""
    known = set(images)
    if table is None:
        stems = {os.path.splitext(path)[0] for path in images}
        known |= {path for path in files if path.endswith((".txt", ".TXT")) and path[:-4] in stems}
    else:
        known.add(os.path.relpath(table, folder))
    tally = Tally()
    for path in files:
        if path not in known:
            tally.add(IGNORED, _printable(path))
    return tally


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def _classes(folder: Path, paths: Sequence[str], known: Sequence[str] | None) -> list[str] | None:
    """Return the first level of sub-folders, if there are at least two and every image is in one."""
    found = sorted({path.partition("/")[0] for path in paths if "/" in path})
    classes = known is not None or (len(found) > 1 and all("/" in path for path in paths))
    if classes and (odd := next((name for name in found if _printable(name) != name), None)):
        raise UserError(f"{folder}: the name of the class {os.fsencode(odd)!r} is not UTF-8; rename it, or give --flat")
    if known is not None:
        strange = [name for name in found if name not in known]
        if strange or not all("/" in path for path in paths):
            wrong = f"{strange[0]!r}" if strange else "images outside class folders"
            raise UserError(f"--classes: {folder} has {wrong}, which the classes lack")
        return list(known)
    return found if classes else None


def _join(folder: Path, paths: Sequence[str], table: Path, rows: list[Row]) -> list[list[str | None]]:
    """Return the captions of each image, one for each caption of each row of the table; None if it names none."""
    captions: dict[str, list[str | None]] = {path: [] for path in paths}
    missing = []
    for row in rows:
        path = os.path.normpath(os.path.relpath(row.image, folder) if os.path.isabs(row.image) else row.image)
        if path in captions:
            captions[path] += row.captions or [""]
        else:
            missing.append(row)
    if missing:
        raise UserError(
            f"--captions {table}: {len(missing):,} of {len(rows):,} rows name images that are not in {folder}, "
            f"such as {missing[0].image!r} (row {missing[0].number}); paths are relative to that folder"
        )
    return [captions[path] or [None] for path in paths]
