"""The kinds of sources from which shards can be created: detection of a source's kind, and functions to open sources.

A new kind needs a module next to this one with a subclass of `Records`, an entry of `SOURCE_KINDS` in `__init__.py`,
and a branch of `kind_of_source` and of `open_source`. Each option that applies to the new kind must name it in its
`AppliesTo`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import LibraryMissing
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.config.arguments import option_of
from m3ae_fast.images.suffixes import is_image
from m3ae_fast.shards.options import SourceOptions, kinds_with
from m3ae_fast.shards.sources import SOURCE_KINDS, SourceKind
from m3ae_fast.shards.sources.folder import Folder
from m3ae_fast.shards.sources.hdf5 import Hdf5
from m3ae_fast.shards.sources.huggingface import HuggingFace, NotLoaded, is_saved_dataset
from m3ae_fast.shards.sources.image_files import find_files
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.sources.table_rows import READERS

_HDF5_SUFFIXES, _HDF5_SIGNATURE = (".hdf5", ".h5"), b"\x89HDF\r\n\x1a\n"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # form of a dataset's name on the Hub
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


def _kind_of_folder(folder: Path) -> SourceKind:
    if is_saved_dataset(folder):
        return "huggingface"
    tables = False
    for path in find_files(str(folder)):
        if is_image(path):
            return "folder"
        tables |= path.lower().endswith(_DATA_FILES)
    return "huggingface" if tables else "folder"


def open_source(source: str, options: SourceOptions, kind: SourceKind | None = None) -> Records:
    """Return the samples of a source.

    Args:
        source: a folder of images, an HDF5 file in the layout of the official code, or a Hugging Face dataset, which is
            a folder written by `save_to_disk`, a folder of data files, or a name on the Hub.
        options: what is read from it.
        kind: kind of the source; None: detected.

    Raises:
        UserError: the source cannot be read, or an option does not apply to sources of its kind.
    """
    kind = kind or kind_of_source(source)
    for name, field in SourceOptions.model_fields.items():
        if getattr(options, name) != field.default and kind not in (kinds := kinds_with(name)):
            wanted = " or ".join(SOURCE_KINDS[each] for each in kinds)
            option = option_of(SourceOptions, name)
            raise UserError(f"{option} can be used only with {wanted}; {source} is {SOURCE_KINDS[kind]}")
    path = Path(source)
    if kind == "folder":
        return Folder(path, options)
    if kind == "hdf5":
        return Hdf5(path, options)
    return HuggingFace(source, options) if path.exists() else _open_hub(source, options)


def _open_hub(name: str, options: SourceOptions) -> HuggingFace:
    """Return the dataset with this name on the Hub. Raises UserError with a hint about folders if there is none."""
    hint = _hint(Path(name))
    # without a network, a request to the Hub would take a minute
    if (hint and "/" not in name) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder{hint}")
    try:
        return HuggingFace(name, options)
    except NotLoaded as error:
        reason = f"it was also tried as the name of a dataset: {error}"
    except LibraryMissing as error:
        reason = f"if it is the name of a dataset on the Hugging Face Hub: {error}"
    raise UserError(f"{name}: no such folder{hint}; {reason}")
