"""Sources of shards: folders, HDF5 files, Hugging Face datasets, tables of captions."""

from typing import Literal

SourceKind = Literal["folder", "hdf5", "huggingface"]
SOURCE_KINDS: dict[SourceKind, str] = {
    "folder": "a folder of images",
    "hdf5": "an HDF5 file",
    "huggingface": "a Hugging Face dataset",
}
