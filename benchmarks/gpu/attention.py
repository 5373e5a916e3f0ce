"""python -m benchmarks.gpu.attention: times all installed attention kernels and the project's own, forward and
backward, for a micro-batch of 512 samples. Writes gpu-attention.json."""

from __future__ import annotations

import sys

import torch
from m3ae_kernels.attention import Kernel, cuda
from m3ae_kernels.attention.padded import PADDED

from benchmarks import results
from benchmarks.measure import CpuDevice, CudaDevice

SAMPLES = 512
# M3AE-Large: heads, head dimension, rows of a sample with a caption of 20 words ("long": with the longest caption)
SHAPES = {"encoder": (16, 64, 55), "encoder, long": (16, 64, 81), "decoder": (16, 32, 218)}
REPEATS = 10


def kernels(device: torch.device) -> dict[str, Kernel]:
    """Return the kernels that can be created on this machine, by name."""
    found: dict[str, Kernel] = {"padded": PADDED}
    for name, make in cuda.MAKERS.items():
        try:
            found[name] = make(device)
        except Exception as error:  # any error: not installed, or a broken build
            print(f"{name} is left out: {next(iter(str(error).splitlines()), repr(error))}", flush=True)
    return found


def time_kernels(
    device: CpuDevice | CudaDevice,
    found: dict[str, Kernel],
    samples: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[results.Row]:
    """Return a row per shape and kernel. If a kernel fails or its results differ from padded attention, the row
    contains the reason in place of a time."""
    rows: list[results.Row] = []
    for shape, (heads, dim, length) in SHAPES.items():
        inputs = cuda.example(device.device, dtype, heads, dim, length, samples)
        expected = cuda.results(PADDED, *inputs)
        for name, kernel in found.items():
            row: results.Row = {"shape": shape, "kernel": name, "ms": None, "verdict": "ok"}
            try:
                off = cuda.distance(cuda.results(kernel, *inputs), expected)
                if not off <= cuda.ERROR:
                    row["verdict"] = f"off by {off:.0%}"
                row["ms"] = _ms(device, kernel, inputs)
            except Exception as error:  # the kernel does not support this GPU or size, or there is not enough memory
                row["verdict"] = " ".join(str(error).split())[:120] or repr(error)
            rows.append(row)
            print(row, flush=True)
    return rows


def _ms(device: CpuDevice | CudaDevice, kernel: Kernel, inputs: tuple) -> float:
    """Return the time of one pass on the device in milliseconds, without waits for the host."""
    device.head_start()
    pairs = []
    for _ in range(REPEATS):
        before = device.stamp()
        cuda.results(kernel, *inputs)
        pairs.append((before, device.stamp()))
    return sorted(device.between(pairs))[REPEATS // 2]


def main() -> int:
    """Print and write the table, and return the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu.attention: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    device = CudaDevice()
    rows = time_kernels(device, kernels(device.device), SAMPLES)
    results.write("gpu-attention", f"Attention of {SAMPLES} samples, forward and backward", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
