"""Detection of the kind of a source: a folder of images, an HDF5 file, or a Hugging Face dataset."""

from __future__ import annotations

from pathlib import Path

from m3ae_fast.shards.settings import SourceKind
from m3ae_fast.shards.sources.folder import SUFFIXES, find_files

HDF5_SUFFIXES = (".hdf5", ".h5")
_SAVED = ("dataset_dict.json", "state.json")  # a folder written by `save_to_disk` contains one of them
_DATA_FILES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")


def kind_of_source(source: str) -> SourceKind:
    """Return the kind of a source. A name that does not exist as a path is a dataset on the hub, unless it has the form
    of a path, such as ./photos."""
    path = Path(source)
    if path.is_dir():
        return _kind_of_folder(path)
    if path.exists() or source.lower().endswith(HDF5_SUFFIXES):
        return "hdf5"
    written_as_path = source.startswith((".", "/", "~")) or source.endswith("/")
    return "folder" if written_as_path else "huggingface"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the library `datasets`."""
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
