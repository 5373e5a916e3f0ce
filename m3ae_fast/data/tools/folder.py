"""A folder of images as a source: class folders, captions from a table or from .txt files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ae_fast.data.bad_samples import BadSample
from m3ae_fast.data.index import IMAGE_SUFFIXES
from m3ae_fast.data.tools.caption_table import read_captions
from m3ae_fast.data.tools.source import Record, read_file
from m3ae_fast.errors import UserError

SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_KEPT_BACK = 1 << 16  # bytes of a .txt that are read; more is no caption


@dataclass(frozen=True)
class _Image:
    path: str  # below the folder
    caption: str | None  # None: see the .txt beside it


class Folder:
    """Images below a folder, in the order of their paths. See `source.Source`.

    Args:
        folder: where to look, in sub-folders too.
        captions: a table of captions with a row for each sample of an image; None: .txt files beside the images.
        columns: its columns of images and captions, None where they have usual names.
        classes: names of the classes, in the order of their labels; None: the sub-folders' names, sorted.
        flat: sub-folders are not classes.

    Raises:
        UserError: there is no image, or the table names some that are not there.
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
        paths = sorted(_find(self.folder))
        if not paths:
            raise UserError(f"{folder}: no image in it ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
        self.classes: Sequence[str] | None = None if flat else _classes(folder, paths, classes)
        self._labels = {name: label for label, name in enumerate(self.classes or ())}
        self._images = [_Image(path, None) for path in paths]
        if captions is not None:
            self._images = _join(folder, paths, captions, read_captions(captions, *columns))
        self.splits = {"train": len(self._images)}
        self.identity: dict[str, Any] = {"kind": "folder", "sha256": self._fingerprint()}

    def read(self, split: str, number: int) -> Record:
        image = self._images[number]
        path = os.path.join(self.folder, image.path)
        caption = self._beside(path) if image.caption is None else image.caption
        name = image.path.partition("/")[0] if self.classes else None
        about: dict[str, Any] = {"path": os.fsencode(image.path).decode("utf-8", "replace")}
        if name is not None:
            about["class_name"] = name
        return Record(read_file(path), caption, None if name is None else self._labels[name], about)

    def _beside(self, path: str) -> str | None:
        try:
            with open(os.path.splitext(path)[0] + ".txt", "rb") as file:
                return file.read(_KEPT_BACK).decode("utf-8-sig")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(f"{os.path.splitext(path)[0]}.txt: cannot be read ({error})") from None

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for image in self._images:
            size = os.stat(os.path.join(self.folder, image.path)).st_size
            digest.update(f"{image.path!r} {size} {image.caption!r}\n".encode())
        return digest.hexdigest()


def _find(folder: str) -> Iterator[str]:
    """Paths of images below `folder`, hidden ones left out; links to folders are followed once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _classes(folder: Path, paths: Sequence[str], known: Sequence[str] | None) -> list[str] | None:
    """The first level of sub-folders, if there are at least two and every image is in one."""
    found = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if known is not None:
        strange = [name for name in found if name not in known]
        if strange or not all("/" in path for path in paths):
            wrong = f"{strange[0]!r}" if strange else "images outside class folders"
            raise UserError(f"--classes: {folder} has {wrong}, which the classes lack")
        return list(known)
    return found if len(found) > 1 and all("/" in path for path in paths) else None


def _join(folder: Path, paths: Sequence[str], table: Path, rows: list[tuple[str, str]]) -> list[_Image]:
    """A sample for each row of the table, and for each image that it does not name."""
    captions: dict[str, list[str]] = {path: [] for path in paths}
    missing = []
    for number, (name, caption) in enumerate(rows, 1):
        path = os.path.normpath(os.path.relpath(name, folder) if os.path.isabs(name) else name)
        if path in captions:
            captions[path].append(caption)
        else:
            missing.append((number, name))
    if missing:
        number, name = missing[0]
        raise UserError(
            f"--captions {table}: {len(missing):,} of {len(rows):,} rows name images that are not in {folder}, "
            f"such as {name!r} (row {number}); paths are relative to that folder"
        )
    return [_Image(path, caption) for path in paths for caption in captions[path] or [""]]
