"""Block sizes for the device at hand: candidates timed inside the op that uses the kernel, the best written down."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import m3ae_kernels
import torch
from m3ae_kernels import tuning
from m3ae_kernels.aot import CASES, SHARED_BYTES, compile_case

from benchmarks.measure import CpuDevice, CudaDevice, measure
from benchmarks.ops import OPS, Sizes, Workload, make

# Which workload runs a kernel.
RUNS = {
    "patch_embed": "patch_embed",
    "patch_embed_dweight": "patch_embed",
    "rows": "scatter_tokens, decoder",
    "invert": "gather_tokens",
    "segment_sum": "scatter_tokens, decoder",
    "gather_norm": "gather_tokens + LayerNorm",
    "gather_norm_backward": "gather_tokens + LayerNorm",
    "patch_stats": "masked_pixel_loss, norm_pix",
    "pixel_error": "masked_pixel_loss",
    "token_rows": "masked_token_loss",
}


def candidates(settings: dict[str, int]) -> Iterator[dict[str, int]]:
    """Settings to try for a kernel that has `settings` now."""
    if "BLOCK_K" in settings:
        for (m, n), k, warps, stages in itertools.product(
            ((64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)), (32, 64, 128), (4, 8), (2, 3, 4)
        ):
            yield {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        return
    choices = {
        "TILE": (1024, 2048, 4096, 8192),
        "BLOCK_M": (4, 8, 16, 32),
        "BLOCK_D": (128, 256, 512),
        "BLOCK_V": (1024, 2048, 4096, 8192),
        "BLOCK": (512, 1024, 2048),
        "num_warps": (2, 4, 8),
    }
    names = [name for name in choices if name in settings]
    for values in itertools.product(*(choices[name] for name in names)):
        yield dict(zip(names, values))


def tune(device: CudaDevice | CpuDevice, sizes: Sizes, dtype: torch.dtype, log=print) -> None:
    """Replaces the device's table by the best candidates that compile soundly, and writes it.

    A candidate is compiled first, as `m3ae_kernels.aot` does it: what spills or does not fit is not timed.
    """
    arch = tuning.arch_of(device.device)
    table, width = tuning.table(arch), "16" if dtype.itemsize == 2 else "32"
    cases = {}
    for case in CASES:
        cases.setdefault(case.table or case.kernel, []).append(case)
    for work in (make(name, sizes, dtype, device.device) for name in OPS):
        for kernel in (k for k, name in RUNS.items() if name == work.name):
            before = table[kernel][width]
            best, best_time = before, _time(device, work)
            for settings in candidates(before):
                if not _sound(cases[kernel], arch, dtype, settings):
                    continue
                table[kernel][width] = settings
                time = _time(device, work)
                if time < 0.99 * best_time:
                    best, best_time = settings, time
            table[kernel][width] = best
            log(f"{kernel}: {before} -> {best}, {work.name} {best_time:.3f} ms")
    write(arch, table)


def _sound(cases: list, arch: str, dtype: torch.dtype, settings: dict[str, int]) -> bool:
    if arch not in SHARED_BYTES:  # the interpreter
        return True
    name = "bf16" if dtype.itemsize == 2 else "fp32"
    return not any(compile_case(case, arch, name, settings).problems for case in cases)


def _time(device: CudaDevice | CpuDevice, work: Workload) -> float:
    return measure(device, {"ours": lambda: work.run(m3ae_kernels)}, rounds=1, repeats=10)["ours"].p50


def write(arch: str, table: dict, folder: Path = tuning.FOLDER) -> Path:
    """Writes a table as the package keeps it."""
    kernels = []
    for name, widths in table.items():
        lines = ",\n".join(f'    "{width}": {json.dumps(settings)}' for width, settings in widths.items())
        kernels.append(f'  "{name}": {{\n{lines}\n  }}')
    path = folder / f"{arch}.json"
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    return path
