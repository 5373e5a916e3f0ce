"""What the machine can do: the faster precision, peak FLOP/s, memory in use."""

from __future__ import annotations

import os
import resource
import shutil
import time

import torch

from m3ae_fast.config import Config
from m3ae_fast.cpu import this_cpu

# dense bf16 tensor-core peaks from NVIDIA's and AMD's data sheets, FLOP/s
_BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def fast_precision(device: torch.device) -> str:
    """ "bf16" or "fp32": in which of the two matmuls are faster. Alike on both, bf16 would win for its memory."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else this_cpu().bf16
    return "bf16" if fast else "fp32"


def settle_precision(config: Config, device: torch.device) -> Config:
    """`config` with train.precision "auto" decided for `device`."""
    if config.train.precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": fast_precision(device)})})


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to measure utilisation against: the data sheet's for known GPUs in bf16, else what a large matmul reaches
    here, best of three."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _BF16_PEAKS.items():
            if part in name:
                return peak
    size = 1024 if device.type == "cpu" else 8192
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
    """Whether there is a C++ compiler, as torch.compile needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU or this machine has no memory left."""
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch's and CUDA's
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on the GPU, or the most that this process held in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
