"""Pickles as written by the official scripts, created with stand-ins for the modules that these import."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def modules(**classes: type | Any):
    """Create modules for the duration of a context: `m3ae__model__M3AETrainState=cls` adds `cls` to m3ae.model."""
    made = []
    for path, value in classes.items():
        *parents, name = path.split("__")
        module = ".".join(parents)
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        for i in range(1, len(parents) + 1):
            parent = ".".join(parents[:i])
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                made.append(parent)
        setattr(sys.modules[module], name, value)
    try:
        yield
    finally:
        for module in made:
            del sys.modules[module]


@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Any
    apply_fn: Any
    params: Any
    tx: Any
    opt_state: Any
    tokenizer_params: Any = None


@dataclasses.dataclass(frozen=True)
class Transformation:
    init: Any
    update: Any


class AdamState(tuple):
    def __reduce__(self):
        return AdamState, (list(self),)


class Cell:
    """A cell of cloudpickle: a call without arguments whose value is set afterwards."""

    def __reduce__(self):
        return Cell, (), {"value": [1, "two"]}, iter([3, 4]), iter([("five", 6)])

    def append(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class FrozenDict:
    def __init__(self, inner: dict) -> None:
        self.inner = inner

    def __reduce__(self):
        return FrozenDict, (self.inner,)


def nested(params: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in params.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def write_checkpoint(
    path: Path, params: dict[str, np.ndarray], variant: dict[str, Any], *, frozen: bool = False, protocol: int = 5
) -> Path:
    """Write a checkpoint of `params` by flax path, with optimiser functions and moments, and return its path."""
    tree: Any = nested(params)
    state = TrainState(
        step=np.array(2, np.int32),
        apply_fn=None,
        params={"params": FrozenDict(tree) if frozen else tree},
        tx=Transformation(Cell(), [Cell(), Cell]),
        opt_state=(AdamState((np.array(2), nested(params))), Transformation(None, None)),
    )
    saved = {"step": 1, "epoch": 0, "variant": variant, "state": state, "best_val_acc": np.float32(0.5)}
    with modules(
        m3ae__model__M3AETrainState=TrainState,
        optax___src__base__GradientTransformation=Transformation,
        optax___src__transform__ScaleByAdamState=AdamState,
        cloudpickle__cloudpickle___make_empty_cell=Cell,
        flax__core__frozen_dict__FrozenDict=FrozenDict,
    ):
        path.write_bytes(pickle.dumps(saved, protocol))
    return path


class Call:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call
