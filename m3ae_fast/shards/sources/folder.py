"""Records from a folder of images, with splits, class folders, and captions from a table or from .txt files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.index import IMAGE_SUFFIXES, MASK_SUFFIX
from m3ae_fast.images.bands import ReaderMissing
from m3ae_fast.images.decoding import own_bands
from m3ae_fast.images.label_mask import read_mask
from m3ae_fast.shards.duplicate_images import join, middle, number_same
from m3ae_fast.shards.problem_counts import IGNORED, OUTSIDE, Tally
from m3ae_fast.shards.sources.caption_table import CAPTION_OPTION, Row, read_captions
from m3ae_fast.shards.sources.folder_layout import TRAIN, Layout, listed, printable, split_of_folder, understand
from m3ae_fast.shards.sources.interface import Record, Records, read_file

_SHOWN = 3  # missing images that are named
_INSPECTED = 1000  # rows of a table that are inspected for the names of fields
_MISSING = ("nan", "null", "none", "n/a")  # texts with which other programs write missing values
# names of the tables that the `datasets` library reads in any folder of images
_METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


class ImagesMissing(UserError):
    """Raised if at least half of the rows of a table name images that are not in the folder. `has_captions`: whether
    the table has captions."""

    def __init__(self, message: str, has_captions: bool = True) -> None:
        super().__init__(message)
        self.has_captions = has_captions


class _Sample(NamedTuple):
    """A sample's caption and fields from a table."""

    caption: str | None = None
    fields: str = ""  # JSON object


class Folder(Records):
    """Records of the images below a folder, sorted by path, with the splits and classes that `folder_layout` detects.

    Args:
        folder: the folder, which is searched recursively.
        captions: a table in which each row contains an image, its caption and other fields for the sample's json. With
            None, or for a table without captions, captions come from .txt files next to the images.
        columns: names of the table's columns of images and captions; None: columns with usual names. With NO_CAPTIONS,
            the table has no captions.
        classes: names of the classes in the order of their labels; None: the sorted names of the sub-folders.
        flat: whether to ignore the meaning of sub-folders as splits and classes.
        masks: folder with label masks, NAME.png for NAME.jpg in the same sub-folders, which become KEY.mask.png; None:
            no masks. The folder may be inside `folder`.

    `ignored` counts ignored files.

    Raises:
        UserError: a folder cannot be listed, there is no image, no image has a mask although `masks` is given, the
            table cannot be read, has no captions or mostly names images that do not exist, split folders and other
            folders are mixed at one level, the folders do not fit `classes`, or a library that is needed to read the
            images is missing.
    """

    def __init__(
        self,
        folder: Path,
        captions: Path | None = None,
        columns: tuple[str | None, str | None] = (None, None),
        classes: Sequence[str] | None = None,
        flat: bool = False,
        masks: Path | None = None,
    ) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder")
        self.folder, self._masks = str(folder), masks
        files, paths = _find_images(folder, masks, flat)
        if captions is None:
            _refuse_metadata(folder, files)
        directories = {os.path.dirname(path) for path in paths}
        layout = understand(self.folder, directories, classes, flat)
        notes = [] if flat else [*_linked(self.folder, directories), *_empty(self.folder, directories)]
        self.classes, self.notes = layout.classes, [*layout.notes, *notes]
        _require_utf8(folder, self.classes or ())
        self._class_names = layout.names  # class of each directory
        self._labels = {name: label for label, name in enumerate(self.classes or ())}
        strays = [path for path in paths if os.path.dirname(path) not in layout.splits]
        self._paths = [path for path in paths if os.path.dirname(path) in layout.splits]
        self.unlabelled = _why_unlabelled(layout, self._paths)
        # indices into the paths, by split
        rows: dict[str, list[int]] = {split: [] for split in layout.splits.values()}
        for number, path in enumerate(self._paths):
            rows[layout.splits[os.path.dirname(path)]].append(number)
        self._rows = {split: np.array(numbers) for split, numbers in rows.items()}
        self._samples, self._has_captions = [[_Sample()]] * len(self._paths), False  # by image
        if captions is not None:
            self.notes += self._read_table(captions, columns)
        counts = np.array([len(each) for each in self._samples])
        super().__init__({split: counts[rows] for split, rows in self._rows.items()})
        if masks is not None:
            self.notes += _missing_masks(masks, self._paths)
        self.ignored = _ignored(folder, files, paths, captions, self._has_captions)
        for path in strays:
            self.ignored.add(OUTSIDE, printable(path))
        self.identity = {"kind": "folder", **self._fingerprints()}
        if [*self.splits] != [TRAIN]:
            self.identity["splits"] = self.splits

    def _read_table(self, table: Path, columns: tuple[str | None, str | None]) -> list[str]:
        """Set the samples of each image according to a caption table, and return notes about the table."""
        rows = read_captions(table, *columns)
        self._has_captions = rows[0].captions is not None
        if self._has_captions and not any(text.strip() for row in rows for text in row.captions or ()):
            raise UserError(
                f"--captions {table}: all captions are empty; specify the column of captions with {CAPTION_OPTION}, or "
                f"add {CAPTION_OPTION} '' to read only fields"
            )
        self._samples, notes = _join(Path(self.folder), self._paths, table, rows)
        fields = {name: None for row in rows[:_INSPECTED] if row.fields for name in json.loads(row.fields)}
        if missing := [text for row in rows for text in row.captions or () if text.strip().lower() in _MISSING]:
            notes.append(
                f"{len(missing):,} captions of {table} are texts such as {missing[0].strip()!r}; if they are missing "
                "values, leave these fields empty"
            )
        if (name := next((each for each in fields if each.lower() == "split"), "")) and len(self._rows) == 1:
            notes.append(
                f"the column {name} of {table} is not used: only sub-folders, such as train and val, are splits"
            )
        if fields:
            notes.append(f"fields of {table} for --labels: {', '.join(f'json.{name}' for name in fields)}")
        return notes

    def name(self, split: str, number: int) -> str:
        return printable(self._paths[self._rows[split][self.place(split, number)[0]]])

    def read(self, split: str, number: int) -> Record:
        row, index = self.place(split, number)
        row = self._rows[split][row]
        path = os.path.join(self.folder, self._paths[row])
        sample = self._samples[row][index]
        caption = sample.caption if self._has_captions else self._caption_file_of(path)
        name = self._class_names[os.path.dirname(self._paths[row])]
        data, members = read_file(path), {}
        if self._masks is not None and os.path.lexists(file := mask_of(self._masks, self._paths[row])):
            members[MASK_SUFFIX] = read_file(str(file))
            read_mask(members[MASK_SUFFIX], data)
        return Record(data, caption, None if name is None else self._labels[name], self._about(row, sample), members)

    def _about(self, row: int, sample: _Sample) -> dict[str, Any]:
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

    def class_counts(self, split: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for row in self._rows[split]:
            if name := self._class_names[os.path.dirname(self._paths[row])]:
                found[name] += len(self._samples[row])
        return found

    def images(self, split: str) -> np.ndarray:
        """Return image numbers; see `interface.Records`. Files with equal bytes, or with names that differ only in the
        suffix, count as one image."""
        paths = [self._paths[row] for row in self._rows[split]]
        files = [os.path.join(self.folder, path) for path in paths]
        sketches = [_sketch(path) for path in track(files, "looking for duplicate images")]
        # an unreadable file has no duplicates
        contents_N = number_same(len(files), [lambda i: sketches[i] or i, lambda i: _digest(files[i])])
        stems: dict[str, int] = {}
        stems_N = np.array([stems.setdefault(os.path.splitext(path)[0], len(stems)) for path in files])
        return join(contents_N, stems_N)[super().images(split)]

    def _caption_file_of(self, path: str) -> str | None:
        """Return the text of the .txt file next to an image; None if there is none."""
        caption_file = _text_file(path)
        if caption_file is None:
            return None
        try:
            return read_file(caption_file).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample(f"{caption_file}: is not UTF-8; save it in UTF-8") from None

    def _fingerprints(self) -> dict[str, str]:
        """Return fingerprints of the images, captions, classes and masks, to detect changes by the user."""
        images, captions = hashlib.sha256(), hashlib.sha256()
        for path, own in zip(self._paths, self._samples):
            file = os.path.join(self.folder, path)
            text = None if self._has_captions else _text_file(file)
            for sample in own:
                images.update(f"{path!r} {_stamp(file)}\n".encode())
                captions.update(f"{sample.caption!r} {text and _stamp(text)}{sample.fields}\n".encode())
        classes = hashlib.sha256(json.dumps(self.classes).encode())
        named = {"pictures": images, "captions": captions, "classes": classes}
        if self._masks is not None:
            stamps = [_stamp(str(mask_of(self._masks, path))) for path in self._paths]
            named["masks"] = hashlib.sha256(repr(stamps).encode())
        return {name: digest.hexdigest()[:16] for name, digest in named.items()}


def _find_images(folder: Path, masks: Path | None, flat: bool) -> tuple[list[str], list[str]]:
    """Return the sorted paths of all files below a folder except the masks, and the sorted paths of the images. Raises
    UserError if there is no image, or if a library that is needed to read the images is not installed."""
    files = sorted(find_files(str(folder), flat))
    if masks is not None:
        own = os.path.relpath(os.path.realpath(masks), os.path.realpath(folder)) + os.sep
        files = [path for path in files if not path.startswith(own)]
    images = [path for path in files if path.lower().endswith(SUFFIXES)]
    if not images:
        raise UserError(f"{folder}: contains no images ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
    _require_reader(str(folder), images)
    return files, images


def _refuse_metadata(folder: Path, files: Sequence[str]) -> None:
    """Raise UserError if a sub-folder contains a table of captions as for the `datasets` library, because it would not
    be read."""
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


def _missing_masks(masks: Path, paths: Sequence[str]) -> list[str]:
    """Return a list that contains a note if some images have no mask. Raises UserError if no image has a mask."""
    missing = [path for path in paths if not os.path.lexists(mask_of(masks, path))]
    if len(missing) == len(paths):
        raise UserError(
            f"--masks {masks}: contains no mask for any of the images; an expected path is, for example, "
            f"{printable(str(mask_of(masks, paths[0])))}"
        )
    if not missing:
        return []
    return [f"{len(missing):,} of {len(paths):,} images, such as {printable(missing[0])}, have no mask in {masks}"]


def mask_of(masks: Path, image: str) -> Path:
    """Return the path of an image's label mask in the folder `masks`. `image`: path of the image relative to the folder
    of images."""
    return masks / (os.path.splitext(image)[0] + ".png")


def _text_file(image: str) -> str | None:
    """Return the path of NAME.txt or NAME.TXT next to NAME.jpg; None if there is none. A broken link counts too,
    because it was meant to be a caption."""
    stem = os.path.splitext(image)[0]
    return next((stem + suffix for suffix in (".txt", ".TXT") if os.path.lexists(stem + suffix)), None)


def _stamp(path: str) -> tuple[int, int] | None:
    """Return the size in bytes and the modification time of a file; None if it does not exist, such as the target of a
    broken link."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _sketch(path: str) -> tuple[int, bytes] | None:
    """Return the size and the middle bytes of a file; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start, length = middle(size)
            return size, hashlib.sha256(os.pread(file.fileno(), length, start)).digest()
    except OSError:
        return None


def _digest(path: str) -> str:
    """Return a digest of a file's content, or its path if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except BadSample:
        return path


def _require_reader(folder: str, paths: Sequence[str]) -> None:
    """Raise UserError if the first TIFF can be read only by tifffile, and tifffile is not installed."""
    first = next((path for path in paths if path.lower().endswith((".tif", ".tiff"))), None)
    if first is None:
        return
    try:
        own_bands(read_file(os.path.join(folder, first)))
    except ReaderMissing as error:
        raise UserError(f"{folder}/{printable(first)}: {error}") from None
    except BadSample:
        pass  # it is reported together with other invalid files


def find_files(folder: str, flat: bool = False) -> Iterator[str]:
    """Yield the paths of files below `folder`, except hidden files. Links to folders are followed, but only once within
    a class or split: two classes may be links to the same folder, and links may form a cycle. Raises UserError if a
    folder cannot be listed."""
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real, below = os.path.realpath(parent), os.path.relpath(parent, folder)
        top = below.split("/")
        place = ("" if flat else "/".join(top[: 2 if split_of_folder(top[0]) else 1]), real)
        if place in seen or (below != "." and real == os.path.realpath(folder)):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _linked(folder: str, directories: Collection[str]) -> Iterator[str]:
    """Yield a note if several directories of images are links to the same folder."""
    first: dict[str, str] = {}
    again = {}
    for directory in sorted(directories, key=lambda each: (os.path.islink(os.path.join(folder, each)), each)):
        kept = first.setdefault(os.path.realpath(os.path.join(folder, directory)), directory)
        if kept != directory:
            again[directory] = kept
    if again:
        link, kept = next(iter(again.items()))
        more = f"; the same applies to {listed([*again][1:])}" if len(again) > 1 else ""
        yield f"{printable(link)} links to {printable(kept)}, so its images count twice{more}"


def _empty(folder: str, directories: Collection[str]) -> Iterator[str]:
    """Yield a note if there are folders without images next to folders with images."""
    filled = set(directories)
    for directory in directories:
        while directory := os.path.dirname(directory):
            filled.add(directory)
    found = []
    for parent in {os.path.dirname(each) for each in filled if each}:
        with os.scandir(os.path.join(folder, parent)) as entries:
            names = [each.name for each in entries if each.is_dir(follow_symlinks=False) and each.name[0] != "."]
        found += [path for path in (os.path.join(parent, name) for name in names) if path not in filled]
    if found:
        yield f"{listed(found)}: no images, although neighbouring folders have some"


def _ignored(
    folder: Path, files: Sequence[str], images: Sequence[str], table: Path | None, has_captions: bool
) -> Tally:
    """Return a tally of the files that are neither an image, nor the caption of an image, nor the caption table."""
    known = set(images)
    if not has_captions:
        stems = {os.path.splitext(path)[0] for path in images}
        known |= {path for path in files if path.endswith((".txt", ".TXT")) and path[:-4] in stems}
    if table is not None:
        known.add(os.path.relpath(table, folder))
    tally = Tally()
    for path in files:
        if path not in known:
            tally.add(IGNORED, printable(path))
    return tally


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def _join(folder: Path, paths: Sequence[str], table: Path, rows: list[Row]) -> tuple[list[list[_Sample]], list[str]]:
    """Return the samples of each image, one per caption of each row of the table, and a note about the rows whose image
    does not exist, if there are any. Raises ImagesMissing if these are at least half of the rows."""
    samples: dict[str, list[_Sample]] = {path: [] for path in paths}
    missing = []
    for row in rows:
        path = os.path.normpath(os.path.relpath(row.image, folder) if os.path.isabs(row.image) else row.image)
        if path in samples:
            samples[path] += [_Sample(caption, row.fields) for caption in row.captions or [""]]
        else:
            missing.append(row)
    found = [samples[path] or [_Sample()] for path in paths]
    if not missing:
        return found, []
    more = ", such as" if len(missing) > _SHOWN else ":"
    examples = ", ".join(f"{row.image!r} (row {row.number})" for row in missing[:_SHOWN])
    about = f"{len(missing):,} of {len(rows):,} rows refer to images that are not in {folder}{more} {examples}"
    if 2 * len(missing) >= len(rows):
        raise ImagesMissing(
            f"--captions {table}: {about}; paths are relative to that folder", rows[0].captions is not None
        )
    return found, [f"{table}: left out, because {about}"]
