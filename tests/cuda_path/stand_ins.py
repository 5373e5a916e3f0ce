"""Stand-ins for modules that are installed only on machines with a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch


class FusedAdam(torch.optim.AdamW):
    """An optimiser with the interface of apex's and DeepSpeed's FusedAdam: a flag for AdamW, and one step count per
    group."""

    def __init__(self, params, *, adam_w_mode: bool, **options) -> None:
        assert adam_w_mode
        super().__init__(params, **options)

    def step(self, closure=None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


class BrokenAdam:
    """An optimiser that raises an error, as if the extension of apex were not built, or DeepSpeed did not find nvcc."""

    def __init__(self, *_, **__) -> None:
        raise RuntimeError("Please install nvcc")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents) -> None:
    """Install a module with the attributes `contents`. Without attributes, importing it fails."""
    parts = name.split(".")
    if contents and len(parts) > 1 and parts[0] not in sys.modules:
        monkeypatch.setitem(sys.modules, parts[0], ModuleType(parts[0]))
    module = None
    if contents:
        module = ModuleType(name)
        vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
