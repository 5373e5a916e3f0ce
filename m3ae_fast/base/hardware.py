"""Capabilities of this machine: the precision in which matmuls are fast, peak FLOP/s, memory and compiler."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil
import torch
from m3ae_kernels.cpu.processor import this_cpu

from m3ae_fast.base.environment import DEVICES, Device
from m3ae_fast.base.errors import UserError


class HasPrecision(Protocol):
    """A config section, a pydantic model, with a setting `precision`: "auto", "bf16" or "fp32"."""

    @property
    def precision(self) -> Any:
        """Return the setting."""

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        """Return a copy with other values of the settings in `update`."""


C = TypeVar("C", bound=HasPrecision)


def uses_gpu(device: Device | None) -> bool:
    """Return whether `--device` selects a GPU. Without `--device`, a GPU is selected if there is one. Raises UserError
    if the selected GPU does not exist, if the name is unknown, or if the driver of the GPUs is too old for torch."""
    if device not in (None, *DEVICES):
        raise UserError(
            f"device {device}: must be {' or '.join(DEVICES)}; to select one of several GPUs, set CUDA_VISIBLE_DEVICES"
        )
    if device != "cpu" and (too_old := _old_driver()):
        raise UserError(too_old)
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device cuda: torch finds no GPU on this machine; choose device cpu")
    return available and device != "cpu"


def _old_driver() -> str:
    """Return a message if there is an NVIDIA driver, but it is too old for the installed torch; otherwise "". With
    such a driver, torch prints a warning and uses the CPU.

    A driver supports all minor versions of its major CUDA version ("CUDA Compatibility" in NVIDIA's documentation).
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden:
        return ""
    supported, needed = _supported_cuda(), int(torch.version.cuda.partition(".")[0])
    if not supported or supported // 1000 >= needed:
        return ""
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    driver = f"NVIDIA driver {found[1]}" if found else "NVIDIA driver"
    return (
        f"the {driver} supports CUDA {supported // 1000}.{supported % 1000 // 10}, but the installed torch was built "
        f"for CUDA {torch.version.cuda}: update the driver, install a torch for an older CUDA, or add --device cpu"
    )


def _supported_cuda() -> int:
    """Return the CUDA version that the NVIDIA driver supports, for example 12040 for CUDA 12.4; 0 without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value


def unused_gpus(world: int, device: torch.device) -> int:
    """Return the number of GPUs of this node that a program with `world` ranks does not use, because it runs as a
    single process; 0 on a CPU. `device`: device of this rank."""
    return torch.cuda.device_count() - 1 if world == 1 and device.type == "cuda" else 0


def chosen_device(name: Device | None) -> torch.device:
    """Return the device that `--device` selects. Raises UserError as `uses_gpu` does."""
    return torch.device("cuda" if uses_gpu(name) else "cpu")


class Peaks(NamedTuple):
    """Peak throughput of a GPU, from its data sheet."""

    flops: float  # dense bf16 on tensor cores, FLOP/s
    bandwidth: float  # memory bandwidth, bytes/s


# The keys are parts of GPU names; the first key that occurs in a GPU's name is used.
PEAKS = {
    "H200": Peaks(989e12, 4.8e12),
    "H100 PCIe": Peaks(756e12, 2.0e12),
    "H100 NVL": Peaks(835e12, 3.9e12),
    "H100": Peaks(989e12, 3.35e12),
    "B200": Peaks(2250e12, 8.0e12),
    "A100-SXM4-40": Peaks(312e12, 1.555e12),
    "A100": Peaks(312e12, 2.039e12),
    "L40S": Peaks(362e12, 0.864e12),
    "RTX 4090": Peaks(165e12, 1.008e12),
    "MI300X": Peaks(1307e12, 5.3e12),
}
_DRIVER = Path("/proc/driver/nvidia/version")  # written by the kernel module of the NVIDIA driver
_SLOW = 5e9  # FLOP/s; CPUs without instructions for bf16 are slower in bf16
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameter numbers of mallopt


def fast_precision(device: torch.device) -> str:
    """Return the precision, "bf16" or "fp32", in which matmuls are faster."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else this_cpu().bf16
    return "bf16" if fast else "fp32"


def resolve_precision(config: C, device: torch.device) -> C:
    """Return `config` with precision "auto" resolved for `device`."""
    return config if config.precision != "auto" else config.model_copy(update={"precision": fast_precision(device)})


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of matmuls for a resolved precision."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def data_sheet(name: str) -> Peaks | None:
    """Return the peak throughput of the GPU called `name`; None if the GPU is unknown."""
    return next((peaks for part, peaks in PEAKS.items() if part in name), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s for measuring utilisation: the data sheet's value for known GPUs in bf16, otherwise the
    measured FLOP/s of a matmul. The matrices are large, unless this would take seconds on this CPU."""
    if device.type == "cpu":
        small = _matmul_flops(128, device, dtype)
        return small if small < _SLOW else _matmul_flops(1024, device, dtype)
    if dtype == torch.bfloat16 and (known := data_sheet(torch.cuda.get_device_name(device))):
        return known.flops
    return _matmul_flops(8192, device, dtype)


def _matmul_flops(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a matmul of size x size matrices, the best of four measurements."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile requires."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"))


def missing_for_triton() -> list[str]:
    """Return the tools that Triton requires to build its launchers on a GPU, but that are not installed."""
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    missing = [] if any(shutil.which(name) for name in compilers if name) else ["a C compiler (apt install gcc)"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h (apt install python3-dev, or the -devel package)")
    return missing


def pins_memory(device: torch.device) -> bool:
    """Return whether copies from pinned memory to the device are faster and overlap with the computation."""
    return device.type == "cuda"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: on a GPU, the memory allocated by torch; on the CPU, the resident memory of this
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Set glibc to keep freed memory for the next tensors. By default, glibc returns large blocks to the kernel at
    once, and a step on the CPU then causes 100,000 page faults. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def missing_memory(needed: float, device: torch.device) -> str:
    """Return a message with the required and the free memory if `needed` bytes are 90 % or more of the free memory of a
    device; otherwise ""."""
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return "" if needed < 0.9 * free else f"{needed / 1e9:.3g} GB are needed, and {free / 1e9:.3g} GB are free"
