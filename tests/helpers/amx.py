"""The AMX kernels, also on CPUs without AMX, on which they are emulated by AVX-512 instructions (amx.h)."""

import hashlib
from pathlib import Path

from m3ae_kernels.cpu.build import BF16, TILES, may_use_tiles
from m3ae_kernels.cpu.processor import this_cpu

HEADER = Path(__file__).with_suffix(".h")
VERSION = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:8]  # a kernel built with another header is another kernel
EMULATED = (*BF16, "-DTILES", f"-DVERSION=0x{VERSION}", "-include", str(HEADER))
TILES_ANYWHERE = TILES if this_cpu().tiles and may_use_tiles() else EMULATED
