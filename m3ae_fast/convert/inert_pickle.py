"""Pickles read without running anything that they name.

The official checkpoints pickle their optimiser with its code, so their globals are many and differ between library
versions. Hence no list of what may be named: NumPy arrays, dtypes and scalars and plain containers are built here, and
every other global becomes a class that does nothing but remember what it was given.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.errors import UserError


class _InertType(type):
    """What is done to a class that stands in for another has no effect either."""

    def __setitem__(cls, key: Any, value: Any) -> None:
        pass

    def __setattr__(cls, name: str, value: Any) -> None:
        pass


class Inert(metaclass=_InertType):
    """An instance of a global that was not loaded, `path`; or what a call of it would have returned."""

    path = ""
    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        inert = object.__new__(cls)
        inert.args = args
        return inert

    # `self` may be the class: a pickle can do anything to what it has loaded
    def __setstate__(*self_and_state: Any) -> None:
        if len(self_and_state) == 2:
            self, self.state = self_and_state

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(*_: Any) -> None:
        pass

    extend = add = append


class _Builder(Inert):
    """A global that builds something: calls `build`, and is as inert otherwise."""

    __slots__ = ("build",)

    def __new__(cls, build: Callable) -> _Builder:
        builder = object.__new__(cls)
        builder.build = build
        return builder

    def __setstate__(*_: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Any:
        return self.build(*args)


class _DType(Inert):
    """numpy.dtype(code, ...), whose state is (version, byte order, ...)."""

    def plain(self) -> np.dtype:
        """Raises ValueError for what is no number."""
        code = self.args[0] if self.args else None
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise ValueError(f"arrays of dtype {code!r}")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


class _Array(np.ndarray):
    """What `_reconstruct` returns, before it has its state (version, shape, dtype, Fortran order, bytes)."""

    def __setstate__(self, state: Any) -> None:  # type: ignore[override]
        _, shape, dtype, fortran, data = state
        array = _from_buffer(data, dtype, shape, "F" if fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.tobytes("A")))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    plain = dtype.plain() if isinstance(dtype, _DType) else _refuse(dtype)
    shape = tuple(map(int, shape)) if isinstance(shape, tuple | list) else (int(shape),)
    array = np.frombuffer(bytearray(data) if isinstance(data, bytes | bytearray) else _refuse(data), plain)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> np.generic:
    return _from_buffer(data, dtype, ())[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocols below 3 write bytes."""
    return text.encode("latin-1") if isinstance(text, str) and encoding in ("latin1", "latin-1") else _refuse(encoding)


def _refuse(what: Any) -> Any:
    raise ValueError(f"an array made of {type(what).__name__}")


_BUILDERS: dict[tuple[str, str], Callable] = {
    ("numeric", "_frombuffer"): _from_buffer,
    ("multiarray", "_reconstruct"): lambda *_: np.ndarray.__new__(_Array, (0,), "b"),
    ("multiarray", "scalar"): _scalar,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stand_ins: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self._stand_ins:
            self._stand_ins[path] = _stand_in(module, name, path)
        return self._stand_ins[path]


def _stand_in(module: str, name: str, path: str) -> Any:
    part = re.fullmatch(r"numpy\._?core\.(numeric|multiarray)", module)
    if part and (part[1], name) in _BUILDERS:
        return _Builder(_BUILDERS[part[1], name])
    if path == "_codecs.encode":
        return _Builder(_encode)
    if path == "collections.OrderedDict":
        return _Builder(dict)
    return type("Inert", (_DType if path == "numpy.dtype" else Inert,), {"path": path})


def load(path: Path) -> Any:
    """What a pickle holds: plain containers, strings, numbers, NumPy arrays, and `Inert` for everything else.

    Raises:
        UserError: the file is missing, not a pickle, or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a pickle, or a damaged one ({type(error).__name__}: {reason})") from None
