"""Safe reading of pickles: no code to which a pickle refers is executed.

The official checkpoints contain a pickled optimiser, which refers to many globals (classes and functions). These differ
between versions of the libraries, so a list of allowed globals would always be incomplete. Instead, only NumPy arrays,
dtypes, scalars and plain containers are built, and every other global is replaced with a class that only stores its
arguments.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.base.errors import UserError


class Inert:
    """A placeholder for an instance of a class, or for the result of calling a function, that was not loaded. `path`:
    the name of the class or function."""

    path = ""
    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        inert = object.__new__(cls)
        inert.args = args
        return inert

    # `self` may be the class, because a pickle can apply any operation to loaded objects
    def __setstate__(*self_and_state: Any) -> None:
        if len(self_and_state) == 2:
            self_and_state[0].state = self_and_state[1]

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(*_: Any) -> None:
        pass

    extend = add = append


class _Builder:
    """An allowed global, which builds an object when it is called. A state that a pickle sets for the global is
    ignored."""

    def __init__(self, build: Callable) -> None:
        self._build = build

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any) -> Any:
        return self._build(*args)


class _DType(Inert):
    """A placeholder for numpy.dtype(code, ...). Its state is (version, byte order, ...)."""

    path = "numpy.dtype"

    def plain(self) -> np.dtype | None:
        """Return the NumPy dtype; None if it is not numeric."""
        code = self.args[0] if self.args else None
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", code):
            return None
        swapped = isinstance(self.state, tuple) and ">" in self.state
        return np.dtype(code).newbyteorder(">" if swapped else "<")


class _Array(np.ndarray):
    """The result of `_reconstruct`, which is empty until its state (version, shape, dtype, Fortran order, bytes) is
    set."""

    def __setstate__(self, state: Any) -> None:  # type: ignore[override]
        _, shape, dtype, fortran, data = state
        array = _from_buffer(data, dtype, shape, "F" if fortran else "C")
        if isinstance(array, np.ndarray):
            super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.tobytes("A")))  # type: ignore[arg-type]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray | Inert:
    """Return an array, or `Inert` if its elements are not numbers. Raises ValueError or TypeError for invalid
    arguments."""
    plain = dtype.plain() if isinstance(dtype, _DType) else None
    if plain is None:
        return Inert(dtype)
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"the data of an array are of type {type(data).__name__}")
    shape = tuple(map(int, shape)) if isinstance(shape, tuple | list) else (int(shape),)
    return np.frombuffer(bytearray(data), plain).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(dtype: Any, data: Any) -> Any:
    array = _from_buffer(data, dtype, ())
    return array[()] if isinstance(array, np.ndarray) else array


def _encode(text: str, encoding: str) -> bytes:
    """Return encoded text; pickle protocols below 3 store bytes as a call of this function."""
    return str(text).encode("latin-1")


_BUILDERS: dict[str, Callable] = {
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # pickle protocols below 3 store empty bytes as a call of `bytes`
    "collections.OrderedDict": dict,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stand_ins: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self._stand_ins:
            # the names differ between versions of NumPy and Python
            known = path.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
            if known in _BUILDERS:
                self._stand_ins[path] = _Builder(_BUILDERS[known])
            else:
                self._stand_ins[path] = type("Inert", (_DType if path == "numpy.dtype" else Inert,), {"path": path})
        return self._stand_ins[path]


def load_inert(path: Path) -> Any:
    """Return the contents of a pickle: plain containers, strings, numbers, NumPy arrays, and `Inert` for everything
    else. Raises UserError if the file is missing, not a pickle, or damaged."""
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damaged pickles raise many kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not a pickle, or it is damaged ({type(error).__name__}: {reason})") from None
