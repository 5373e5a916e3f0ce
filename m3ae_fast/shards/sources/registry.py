"""The kinds of sources from which shards can be created: detection of a source's kind, and functions to open sources.

A new kind needs a module next to this one with a subclass of `Records`, an entry of `SOURCE_KINDS` in `__init__.py`,
a function in `_OPEN`, and a branch of `kind_of_source`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import LibraryMissing
from m3ae_fast.base.untrusted_file import open_regular, read_json
from m3ae_fast.shards.sources import SOURCE_KINDS, SourceKind
from m3ae_fast.shards.sources.caption_table import CAPTION_OPTION, IMAGE_OPTION, READERS
from m3ae_fast.shards.sources.folder import SUFFIXES, Folder, find_files
from m3ae_fast.shards.sources.hdf5 import Hdf5
from m3ae_fast.shards.sources.huggingface import HuggingFace, NotLoaded
from m3ae_fast.shards.sources.interface import Records

_HDF5_SUFFIXES, _HDF5_SIGNATURE = (".hdf5", ".h5"), b"\x89HDF\r\n\x1a\n"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # form of a dataset's name on the Hub
_SAVED = ("dataset_dict.json", "state.json")  # a folder written by `save_to_disk` contains one of them
_DATA_FILES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")


def kind_of_source(source: str) -> SourceKind:
    """Return the kind of a source. A name that does not exist as a path is a dataset on the Hub, unless it has the form
    of a path, such as ./photos. Raises UserError if the source does not exist, or is a file of another kind."""
    if not source:
        raise UserError("SOURCE is empty; specify images, shards or a dataset")
    path = Path(source)
    if path.is_dir():
        return _kind_of_folder(path)
    if source.lower().endswith(_HDF5_SUFFIXES) or _is_hdf5(path):
        return "hdf5"
    if path.exists() or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise UserError(
            f"{source}: is neither a folder, nor an HDF5 file ({', '.join(_HDF5_SUFFIXES)}), nor the name of a Hugging "
            f"Face dataset{_hint(path)}"
        )
    return "huggingface"


def _is_hdf5(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
    except OSError:
        return False


def _hint(path: Path) -> str:
    """Return a hint for a path that is not a source: a folder with a similar name, or the correct use of a caption
    table; "" if there is none."""
    if path.is_file() and path.suffix.lower() in READERS:
        return f"; to use a table, specify the folder of its images and add --captions {path}"
    parent = path.parent
    siblings = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the `datasets` library."""
    return any((folder / name).exists() for name in _SAVED)


def _kind_of_folder(folder: Path) -> SourceKind:
    if is_saved_dataset(folder):
        return "huggingface"
    tables = False
    for path in find_files(str(folder)):
        if path.lower().endswith(SUFFIXES):
            return "folder"
        tables |= path.lower().endswith(_DATA_FILES)
    return "huggingface" if tables else "folder"


def open_source(
    source: str | os.PathLike[str],
    *,
    kind: SourceKind | None = None,
    captions: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    flat: bool = False,
    masks: str | os.PathLike[str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Records:
    """Return the samples of a source.

    Args:
        source: a folder of images, an HDF5 file in the layout of the official code, or a Hugging Face dataset, which is
            a folder written by `save_to_disk`, a folder of data files, or a name on the Hub.
        kind: kind of the source; None: detected.
        captions: for a folder of images, the file of a table with a row for each sample; None: .txt files next to the
            images.
        image_column, caption_column: column names of the table or the dataset; None: detected. With "" in place of
            `caption_column`, captions are not read from it.
        label_column: column name of the dataset; None: detected.
        classes: for a folder of images, the classes in the order of their labels, or the classes.json of other shards.
        flat: for a folder of images, whether to ignore the meaning of sub-folders as splits and classes.
        masks: for a folder of images, a folder with the label masks in the same sub-folders: a single-channel NAME.png
            for each NAME.jpg. In the shards, a mask is stored as KEY.mask.png next to its image.
        subset: for a dataset, the name of the subset (configuration).
        split: for a dataset, the split to read; None: all splits.

    Raises:
        UserError: the source cannot be read, or an argument does not apply to sources of its kind.
    """
    name = os.fspath(source)
    kind = kind or kind_of_source(name)
    options: dict[str, object] = {"captions": captions, "classes": classes, "flat": flat, "masks": masks}
    options |= {
        "subset": subset,
        "split": split,
        "image_column": image_column,
        "caption_column": caption_column,
        "label_column": label_column,
    }
    given = {option: value for option, value in options.items() if value not in (None, False)}
    for option in given:
        kinds = [each for each, function in _OPEN.items() if option in inspect.signature(function).parameters]
        if kind not in kinds:
            wanted = " or ".join(SOURCE_KINDS[each] for each in kinds)
            option = option.replace("_", "-")
            raise UserError(f"--{option} can be used only with {wanted}; {name} is {SOURCE_KINDS[kind]}")
    return _OPEN[kind](name, **given)


def _open_folder(
    name: str,
    *,
    captions: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    flat: bool = False,
    masks: str | os.PathLike[str] | None = None,
) -> Folder:
    table = None if captions is None else Path(captions)
    names = _read_classes(classes) if isinstance(classes, str | os.PathLike) else classes
    columns = (image_column, caption_column)
    if table is None and columns != (None, None):
        option = IMAGE_OPTION if image_column is not None else CAPTION_OPTION
        raise UserError(f"{option}: names a column of a table, but {name} has no table; specify one with --captions")
    return Folder(Path(name), table, columns, names, flat, None if masks is None else Path(masks))


def _open_hdf5(name: str) -> Hdf5:
    return Hdf5(Path(name))


def _open_dataset(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> HuggingFace:
    columns = (image_column, caption_column, label_column)
    if Path(name).exists():
        return HuggingFace(name, subset, split, columns)
    hint = _hint(Path(name))
    # without a network, a request to the Hub would take a minute
    if (hint and "/" not in name) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder{hint}")
    try:
        return HuggingFace(name, subset, split, columns)
    except NotLoaded as error:
        reason = f"it was also tried as the name of a dataset: {error}"
    except LibraryMissing as error:
        reason = f"if it is the name of a dataset on the Hugging Face Hub: {error}"
    raise UserError(f"{name}: no such folder{hint}; {reason}")


# A function for each kind of source. Its keyword arguments are the options of `open_source` that apply to the kind.
_OPEN: dict[SourceKind, Callable[..., Records]] = {
    "folder": _open_folder,
    "hdf5": _open_hdf5,
    "huggingface": _open_dataset,
}


def _read_classes(path: str | os.PathLike[str]) -> list[str]:
    try:
        names = read_json(Path(path))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        return names
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from None
