"""python -m benchmarks.gpu.candidates: compiles settings of the matmul kernels ahead of time, on a CPU. For each
kernel, it stores the dozen settings that are worth timing on a GPU, in precompiled/ARCH.json.

Settings that spill registers, do not fit into shared memory or do not use tensor cores are excluded. For each tile
shape, the settings with the largest number of bytes in flight to a multiprocessor are kept: registers and shared memory
determine how many program instances run on it, and in each of them the loads of all stages except one are in flight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from m3ae_kernels.aot import CASES, SHARED_BYTES, Case, Report, compile_case

FOLDER = Path(__file__).parent / "precompiled"
DTYPES = {"16": "bf16", "32": "fp32"}
PER_TILE = 2
# registers and warps of a multiprocessor from compute capability 8.0 on (CUDA C programming guide)
REGISTERS, WARPS = 65536, 64
MOST_ACCUMULATORS = 128  # maximum number of a thread's 255 registers for accumulators
# Tile shapes by width of the inputs. A float32 product is computed as three TF32 products, which need three times as
# many registers.
TILES = {
    "16": ((64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)),
    "32": ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128)),
}
DEPTHS = {"16": ((32, 4), (64, 3), (64, 4), (128, 2)), "32": ((16, 4), (32, 2), (32, 3))}  # BLOCK_K, stages

Settings = dict[str, int]


def read(arch: str) -> dict[str, dict[str, list[Settings]]]:
    """Return the settings that are worth timing on an architecture, by kernel and width; empty if none were compiled
    for it."""
    path = FOLDER / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def possible(arch: str, width: str) -> list[Settings]:
    """Return all settings whose accumulators fit into registers and whose stages fit into shared memory."""
    found = []
    for (m, n), (k, stages), warps in itertools.product(TILES[width], DEPTHS[width], (4, 8)):
        accumulators = m * n // (32 * warps)
        if accumulators <= MOST_ACCUMULATORS and stages * (m + n) * k * int(width) // 8 <= SHARED_BYTES[arch]:
            found.append({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages})
    return found


def best(arch: str, width: str, reports: Sequence[tuple[Settings, Report]]) -> list[Settings]:
    """Return the PER_TILE best settings of each tile shape, by the number of bytes in flight on a multiprocessor, among
    those without problems."""

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


def write(arch: str, found: dict[str, dict[str, list[Settings]]]) -> Path:
    kernels = []
    for kernel, widths in found.items():
        lists = []
        for width, settings in widths.items():
            lines = ",\n".join(f"      {json.dumps(s)}" for s in settings)
            lists.append(f'    "{width}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(lists) + "\n  }")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{arch}.json"
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    matmuls = [case for case in CASES if case.matmul and not case.sample[0]]
    # the first case of each kernel, which has RGB images if the kernel reads images
    cases: dict[str, Case] = {case.kernel: case for case in reversed(matmuls)}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.candidates", description=__doc__.split(": ")[1])
    parser.add_argument(
        "--arch", choices=SHARED_BYTES, default="sm_90", metavar="ARCH", help="architecture (default: sm_90)"
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=cases, default=list(cases), metavar="KERNEL", help="default: all"
    )
    parser.add_argument(
        "--width", nargs="+", choices=DTYPES, default=list(DTYPES), help="number of bits per input element"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of parallel compilations (default: number of cores)",
    )
    args = parser.parse_args(arguments)
    found = {kernel: dict(tables) for kernel, tables in read(args.arch).items() if kernel in cases}
    with ProcessPoolExecutor(args.jobs) as pool:
        for kernel, width in itertools.product(args.kernel, args.width):
            tried = possible(args.arch, width)
            print(f"{kernel}, {DTYPES[width]}: {len(tried)} are compiled", flush=True)
            work = [pool.submit(compile_case, cases[kernel], args.arch, DTYPES[width], s) for s in tried]
            reports = [w.result() for w in work]
            kept = best(args.arch, width, list(zip(tried, reports)))
            found.setdefault(kernel, {})[width] = kept
            print(f"{kernel}, {DTYPES[width]}: {len(kept)} of {len(tried)} are worth timing", flush=True)
            write(args.arch, found)
    return 0


def settings_to_try(kernel: str, now: Settings, arch: str, width: str) -> list[Settings]:
    """Return the settings to try. For a matmul kernel, these are the settings that were compiled ahead of time. For
    attention, which takes seconds to compile, the present tile is tried with other numbers of warps and stages, and
    then other tiles, with two stages (which prefetch) and with the present number of stages. For small kernels, these
    are all settings close to the present settings."""
    if "BLOCK_K" in now:
        return read(arch).get(kernel, {}).get(width, [])
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


if __name__ == "__main__":
    sys.exit(main())
