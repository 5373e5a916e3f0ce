"""The settings that are worth timing.

For matmul kernels, settings that spill registers, do not fit into shared memory or do not use tensor cores are
excluded. For each tile shape, the settings with the most bytes in flight to a multiprocessor are kept. Registers and
shared memory determine how many program instances run on a multiprocessor. In each instance, the loads of all stages
except one are in flight.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

from ..aot import CASES, SHARED_BYTES, Report, compile_case

DTYPES = {"16": "bf16", "32": "fp32"}
PER_TILE = 2
# registers and warps of a multiprocessor from compute capability 8.0 on (CUDA C programming guide)
REGISTERS, WARPS = 65536, 64
MOST_ACCUMULATORS = 128  # maximum number of accumulators of a thread, which has 255 registers
# Tile shapes by width of the inputs. A float32 product is computed as three TF32 products, which need three times as
# many registers.
TILES = {
    "16": ((64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)),
    "32": ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128)),
}
DEPTHS = {"16": ((32, 4), (64, 3), (64, 4), (128, 2)), "32": ((16, 4), (32, 2), (32, 3))}  # (BLOCK_K, stages)

Settings = dict[str, int]


def possible(arch: str, width: str) -> list[Settings]:
    """Return all settings whose accumulators fit into registers and whose stages fit into shared memory."""
    found = []
    for (m, n), (k, stages), warps in itertools.product(TILES[width], DEPTHS[width], (4, 8)):
        accumulators = m * n // (32 * warps)
        if accumulators <= MOST_ACCUMULATORS and stages * (m + n) * k * int(width) // 8 <= SHARED_BYTES[arch]:
            found.append({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages})
    return found


def best(arch: str, width: str, reports: Sequence[tuple[Settings, Report]]) -> list[Settings]:
    """Return at most PER_TILE settings of each tile shape. Settings with problems are left out. Of the others, those
    with the most bytes in flight on a multiprocessor are returned."""

    def in_flight(settings: Settings, report: Report) -> float:
        threads = 32 * settings["num_warps"]
        programs = min(REGISTERS // (threads * max(report.registers, 1)), WARPS // settings["num_warps"])
        programs = min(programs, SHARED_BYTES[arch] // max(report.shared_bytes, 1))
        stage = (settings["BLOCK_M"] + settings["BLOCK_N"]) * settings["BLOCK_K"] * int(width) // 8
        return programs * (settings["num_stages"] - 1) * stage

    kept = []
    for tile in TILES[width]:
        mine = [(s, r) for s, r in reports if not r.problems and (s["BLOCK_M"], s["BLOCK_N"]) == tile]
        kept += [s for s, _ in sorted(mine, key=lambda pair: -in_flight(*pair))[:PER_TILE]]
    return kept


@lru_cache
def compiled(kernel: str, arch: str, width: str) -> list[Settings]:
    """Return the settings of a matmul kernel that are worth timing, at most a dozen. All possible settings are compiled
    ahead of time, in parallel processes, which takes about a minute."""
    # the first case of the kernel; its images are RGB if the kernel reads images
    case = next(case for case in CASES if case.kernel == kernel)
    tried = possible(arch, width)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        work = [pool.submit(compile_case, case, arch, DTYPES[width], settings) for settings in tried]
        return best(arch, width, [(settings, each.result()) for settings, each in zip(tried, work)])


def settings_to_try(kernel: str, now: Settings, arch: str, width: str) -> list[Settings]:
    """Return the settings to try. For a matmul kernel, these are the settings that `compiled` returns. For attention,
    which takes seconds to compile, they are the present tile with other numbers of warps and stages, followed by other
    tiles, first with two stages (which prefetch) and then with the present number of stages. For small kernels, they
    are all settings close to the present ones."""
    if "BLOCK_K" in now:
        return compiled(kernel, arch, width)
    if "TILE_M" in now:
        launches = [{"num_warps": w, "num_stages": s} for w, s in itertools.product((2, 4, 8), (1, 2, 3))]
        tiles = [{"TILE_M": m, "TILE_N": n} for m, n in itertools.product((1024, 2048, 4096), (1024, 2048, 4096, 8192))]
        found = [now | launch for launch in launches]
        found += [now | tile | stages for stages in ({"num_stages": 2}, {}) for tile in tiles]
        return [settings for i, settings in enumerate(found) if settings not in found[:i]]
    choices = {
        "TILE": (1024, 2048, 4096, 8192),
        "BLOCK_M": (4, 8, 16),
        "BLOCK_D": (128, 256, 512),
        "BLOCK_V": (1024, 2048, 4096, 8192),
        "BLOCK": (512, 1024, 2048),
        "num_warps": (4, 8),
    }
    names = [name for name in choices if name in now]
    return [now | dict(zip(names, values)) for values in itertools.product(*(choices[name] for name in names))]
