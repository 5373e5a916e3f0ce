"""What shards are to be made of: a folder of images, an HDF5 file, or a Hugging Face dataset."""

from __future__ import annotations

from pathlib import Path

from m3ae_fast.shards.settings import SourceKind
from m3ae_fast.shards.sources.folder import SUFFIXES, find_files

_HDF5 = (".hdf5", ".h5")
_SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder that `save_to_disk` wrote
_DATA_FILES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")


def kind_of_source(source: str) -> SourceKind:
    """Return what a source is. A name that is no path is a dataset of the hub, unless it is written as a path."""
    path = Path(source)
    if path.is_dir():
        return _kind_of_folder(path)
    if path.exists() or source.lower().endswith(_HDF5):
        return "hdf5"
    written_as_path = source.startswith((".", "/", "~")) or source.endswith("/")
    return "folder" if written_as_path else "huggingface"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of the library datasets wrote a folder."""
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
