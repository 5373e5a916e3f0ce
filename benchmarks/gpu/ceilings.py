"""python -m benchmarks.gpu.ceilings: measures the peak throughput of this GPU, for a large matmul, the matmuls of
M3AE-Large's layers, and a copy. Writes gpu-ceilings.json with versions of libraries."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.measure import CpuDevice, CudaDevice, measure

ROWS = {"encoder": 28_160, "decoder": 111_616}  # rows of 512 samples
# inputs and outputs as multiples of the width
LAYERS = {"qkv": (1, 3), "projection": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
WIDTHS = {"encoder": 1024, "decoder": 512}
COPY_BYTES = 4 << 30


def products(rows: int, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the shapes of the three matmuls of a layer (forward, and gradients of input and weight), by name."""
    return {
        "forward": ((rows, inputs), (inputs, outputs)),
        "data gradient": ((rows, outputs), (outputs, inputs)),
        "weight gradient": ((outputs, rows), (rows, inputs)),
    }


def measure_all(device: CpuDevice | CudaDevice, *, divide: int = 1, rounds: int = 5) -> list[results.Row]:
    """Return a row for each matmul and for the copy. Sizes are divided by `divide`."""
    shapes = {"8192 cubed": ((8192, 8192), (8192, 8192))}
    for part, rows in ROWS.items():
        for layer, (inputs, outputs) in LAYERS.items():
            each = products(rows, inputs * WIDTHS[part], outputs * WIDTHS[part])
            shapes |= {f"{part} {layer}, {name}": pair for name, pair in each.items()}
    found: list[results.Row] = []
    for name, pair in shapes.items():
        a, b = (torch.randn([n // divide for n in shape], device=device.device).bfloat16() for shape in pair)
        (m, k), n = a.shape, b.shape[1]
        ms = _median(device, a, b, rounds)
        found.append({"what": name, "shape": f"{m} x {k} x {n}", "p50 ms": ms, "TFLOP/s": 2e-9 * m * k * n / ms})
        found[-1]["GB/s"] = None
    source = torch.empty(COPY_BYTES // divide**2, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    ms = measure(device, {"copy": lambda: target.copy_(source)}, rounds)["copy"].p50
    row: results.Row = {"what": "copy", "shape": str(source.numel()), "p50 ms": ms, "TFLOP/s": None}
    return [*found, row | {"GB/s": 2e-6 * source.numel() / ms}]


def _median(device: CpuDevice | CudaDevice, a: Tensor, b: Tensor, rounds: int) -> float:
    return measure(device, {"product": lambda: a @ b}, rounds)["product"].p50


def main() -> int:
    """Print and write the table, and return the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu.ceilings: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    results.write("gpu-ceilings", "Peak throughput of this GPU", measure_all(CudaDevice()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
