"""Build options of the AMX kernels for any CPU. On a CPU without AMX, AVX-512 instructions emulate those of AMX
(amx.h)."""

import hashlib
from pathlib import Path

from m3ae_kernels.cpu.build import BF16, TILES, may_use_tiles
from m3ae_kernels.cpu.processor import this_cpu

HEADER = Path(__file__).with_suffix(".h")
VERSION = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:8]  # kernels are built again if the header changes
EMULATED = (*BF16, "-DTILES", f"-DVERSION=0x{VERSION}", "-include", str(HEADER))
TILES_ANYWHERE = TILES if this_cpu().tiles and may_use_tiles() else EMULATED
