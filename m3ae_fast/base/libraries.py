"""Optional libraries, required only by some commands and settings, and the extras of this package that install them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from m3ae_fast.base.errors import UserError

# Import names of the optional dependencies in pyproject.toml, by extra. The key "" lists the dependencies of every
# installation.
EXTRAS = {
    "": ("tensorboard",),
    "train": ("deepspeed",),
    "evaluate": ("sklearn", "scipy", "skimage", "timm"),
    "onnx": ("onnx", "onnxruntime", "timm"),
    "wandb": ("wandb",),
    "remote": ("boto3", "obstore"),
    "hdf5": ("h5py",),
    "huggingface": ("datasets",),
    "transformers": ("transformers",),
    "tiff": ("tifffile",),
    "vqgan": ("msgpack",),
}
# display names that differ from the import name
NAMES = {
    "sklearn": "scikit-learn",
    "scipy": "SciPy",
    "skimage": "scikit-image",
    "deepspeed": "DeepSpeed",
}


class LibraryMissing(UserError):
    """Raised if an optional library is not installed."""


def require_libraries(needs: Mapping[str, str], otherwise: str = "") -> None:
    """Raise LibraryMissing if a library is not installed, without importing any library. `needs` maps the name of a
    library to the command, option or setting that requires it. `otherwise` is appended to the message, and names an
    alternative to the installation."""
    missing: dict[str, list[str]] = {}
    for name, what in needs.items():
        if not _is_installed(name):
            missing.setdefault(what, []).append(name)
    if missing:
        wanted = [f"{what} needs {_listed(names)}" for what, names in missing.items()]
        extras = _extras({name for names in missing.values() for name in names})
        raise LibraryMissing(f"{'; '.join(wanted)}: pip install 'm3ae-fast{extras}'{otherwise}")


def library(name: str, what: str) -> Any:
    """Import and return a library that `what` requires. Raises LibraryMissing if it is not installed, and UserError if
    it cannot be imported."""
    require_libraries({name: what})
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs {NAMES.get(name, name)}, which cannot be imported: {error}") from error


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module created by hand has no spec
        return True


def _listed(names: list[str]) -> str:
    *most, last = (NAMES.get(name, name) for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def _extras(missing: set[str]) -> str:
    """Return the extras that install these libraries, in pip's notation; a single extra if one contains them all."""
    whole = next((extra for extra, names in EXTRAS.items() if missing <= {*names}), None)
    if whole is not None:
        return f"[{whole}]" if whole else ""
    first = {next(extra for extra, names in EXTRAS.items() if name in names) for name in missing}
    return f"[{','.join(sorted(first - {''}))}]"
