"""The C kernels of this folder, built by the system's compiler when first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from .processor import this_cpu

FOLDER = Path(__file__).parent
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # what all of them need of a CPU
BF16 = ("-mavx512bf16", "-DBF16")
TILES = (*BF16, "-mamx-tile", "-mamx-bf16", "-DTILES")
_NEEDS = {torch.float32: AVX512, torch.bfloat16: AVX512 | {"avx512_bf16"}}
# what the kernels can read here; evaluated at import, for inside a compiled function it would break the graph
DTYPES = {dtype for dtype, flags in _NEEDS.items() if this_cpu().flags >= flags}
_FLAGS = ["-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp", "-mfma", *(f"-m{name}" for name in sorted(AVX512))]

_log = logging.getLogger(__name__)


@functools.cache
def may_use_tiles() -> bool:
    """Asks Linux for this process's use of AMX's registers (its documentation, arch/x86/xstate)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def load(source: str, flags: tuple[str, ...], otherwise: str) -> ctypes.CDLL | None:
    """The kernels of `source`, a file of this folder, compiled with `flags`.

    None without a C compiler, once with a warning that begins with `otherwise`, what then happens.
    """
    try:
        return ctypes.CDLL(str(compiled(source, flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        _log.warning("%s: %s cannot be built (%s)", otherwise, source, *reason)
        return None


def compiled(source: str, flags: tuple[str, ...]) -> Path:
    """Compile into the user's cache, unless that has been done. Raises OSError or CalledProcessError."""
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    command = [*compiler, *_FLAGS, *flags]
    texts = [path.read_bytes() for path in (FOLDER / source, *sorted(FOLDER.glob("*.h")))]
    name = hashlib.sha256(b"\0".join((*texts, " ".join(command).encode()))).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3ae_kernels"
    library = folder / f"{Path(source).stem}-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # ranks may build at once: each moves a whole file
            built = Path(scratch) / library.name
            command += [str(FOLDER / source), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)
    return library
