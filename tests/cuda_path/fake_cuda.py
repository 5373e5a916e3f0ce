"""A simulated GPU: code finds CUDA available, but its "cuda" tensors are on the CPU and contain real values.

Inside `FakeCuda()`, every device argument "cuda" is replaced by the CPU, `tensor.device` and `tensor.is_cuda` claim
that tensors are on a GPU, and the functions of torch.cuda for streams, events, memory and names behave as on an H100.
All branches of the CUDA path can thus be executed and their results compared. Races, speed and kernels of other
libraries cannot be tested in this way.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from m3ae_kernels.attention import op as attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NAME, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)
CUDA = torch.device("cuda", 0)
AUTOCAST = ("autocast", "is_autocast_enabled", "get_autocast_dtype")  # functions whose first argument is a device type
_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class FakeCuda(TorchFunctionMode):
    """The simulation, for use as a context manager. `events` lists the calls that concern streams, events and devices,
    in order. `pinned` lists the shapes of the tensors that were copied to pinned memory."""

    def __init__(self, name: str = NAME, capability: tuple[int, int] = CAPABILITY, gpus: int = 1) -> None:
        super().__init__()
        self.events: list[str] = []
        self.pinned: list[torch.Size] = []
        self.late = 0  # the next `late` queries of events report unfinished work
        self._pid, self._sync_mode = os.getpid(), 0
        self._patches = contextlib.ExitStack()
        self._answers = {
            "is_available": lambda: True,
            "device_count": lambda: gpus,
            "get_device_name": lambda *_: name,
            "get_device_capability": lambda *_: capability,
            "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
            "set_device": lambda device: self.events.append(f"set_device {device}"),
            "synchronize": lambda *_: self.events.append("synchronize"),
            "memory_allocated": lambda *_: 0,
            "max_memory_allocated": lambda *_: 123_000_000,
            "reset_peak_memory_stats": lambda *_: None,
            "get_sync_debug_mode": lambda: self._sync_mode,
            "set_sync_debug_mode": self._set_sync_mode,
            "device_of": lambda *_: contextlib.nullcontext(),
            "stream": lambda stream: stream,
            "current_stream": lambda *_: _Stream(self, "current"),
            "is_current_stream_capturing": lambda: False,
            "Stream": lambda *_: _Stream(self, "side"),
            "Event": lambda **_: _Event(self),
            "_sleep": lambda *_: None,
        }

    def __enter__(self) -> FakeCuda:
        for name, answer in self._answers.items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        others = [
            (torch.Tensor, "record_stream", _record_stream),
            (torch.Tensor, "pin_memory", lambda t, *_: self._pin(t)),
        ]
        others += [(dist, "init_process_group", _on_gloo(dist.init_process_group))]
        answers = {"is_available": True, "current_device_index": 0, "set_device_index": None, "synchronize": None}
        answers["current_stream"] = _Stream(self, "current")  # queried by optimisers if torch is built with CUDA
        for name, answer in answers.items():
            others.append((torch.accelerator, name, lambda *_, answer=answer: answer))
        others += [(torch, name, _on_cpu(getattr(torch, name))) for name in AUTOCAST]
        choose = attention.kernel_for  # the backward pass runs outside of this mode, and would choose a kernel for CPUs
        others += [(attention, "kernel_for", lambda impl, device, *head: choose(impl, CUDA, *head))]
        for owner, name, answer in others:
            self._patches.enter_context(mock.patch.object(owner, name, answer))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if os.getpid() != self._pid:  # loader workers do not use the GPU
            return function(*args, **(kwargs or {}))
        if function == _DEVICE:
            return CUDA
        if function == _IS_CUDA:
            return True
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        return function(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs or {}))

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.shape)
        return tensor.clone()

    def _set_sync_mode(self, mode: int | str) -> None:
        self.events.append(f"sync_debug_mode {mode}")
        self._sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[call-overload]


class _Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: _Stream) -> None:
        self.cuda.events.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.cuda.events.append(f"wait for {self.name}")

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> None:
        self.cuda.events.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.cuda.events.append(f"off {self.name}")


class _Event:
    """An event; successive events are one millisecond apart."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.events.append("record")

    def query(self) -> bool:
        self.cuda.late -= 1
        return self.cuda.late < 0

    def synchronize(self) -> None:
        self.cuda.events.append("wait for event")

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


def _record_stream(tensor: torch.Tensor, stream: _Stream) -> None:
    stream.cuda.events.append(f"{stream.name} reads")


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _on_cpu(function: Any) -> Any:
    return lambda *args, **kwargs: function(*map(_to_cpu, args), **kwargs)


def _on_gloo(init: Any) -> Any:
    """Return a function that initialises gloo in place of nccl, which requires a GPU."""

    def init_process_group(backend: str, *args: Any, **kwargs: Any) -> None:
        init({"nccl": "gloo"}.get(backend, backend), *args, **kwargs)

    return init_process_group
