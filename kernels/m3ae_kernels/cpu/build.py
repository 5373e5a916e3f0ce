"""The instruction sets that the C kernels in this folder need, and the compilation of these kernels on first use, with
the system's compiler."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from .processor import this_cpu

FOLDER = Path(__file__).parent
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # CPU features that all kernels require
BF16 = ("-mavx512bf16", "-DBF16")
TILES = (*BF16, "-mamx-tile", "-mamx-bf16", "-DTILES")
_NEEDS = {torch.float32: AVX512, torch.bfloat16: AVX512 | {"avx512_bf16"}}
# The required CPU features are evaluated at import, because a query inside a compiled function would break the graph.
DTYPES = {dtype for dtype, flags in _NEEDS.items() if this_cpu().flags >= flags}
LIMIT_S = 60  # time limit of the compiler in seconds; gcc takes 2
_FLAGS = ["-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp", "-mfma", *(f"-m{name}" for name in sorted(AVX512))]

_log = logging.getLogger(__name__)


@functools.cache
def may_use_tiles() -> bool:
    """Request permission from Linux to use AMX registers (Linux documentation, arch/x86/xstate), and return whether it
    is granted."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def load(source: str, flags: tuple[str, ...], otherwise: str) -> ctypes.CDLL | None:
    """Return the kernels of `source`, a file in this folder, compiled with `flags`.

    Return None if the kernels cannot be built. The first failure logs a warning, which begins with `otherwise`: a
    description of what is used instead.
    """
    try:
        return compiled(source, flags)
    except subprocess.TimeoutExpired:
        reason = f"the compiler took longer than {LIMIT_S} s"
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = next(iter((getattr(error, "stderr", None) or str(error)).strip().splitlines()), repr(error))
    _log.warning("%s: %s cannot be built (%s)", otherwise, source, reason)
    return None


def compiled(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the compiled library. If it is not in the user's cache, compile it and store it there.

    Raises:
        OSError, ValueError, CalledProcessError, TimeoutExpired: the compiler is missing, fails or hangs, or the
            variable CC cannot be parsed.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    command = [*compiler, *_FLAGS, *flags]
    texts = [path.read_bytes() for path in (FOLDER / source, *sorted(FOLDER.glob("*.h")))]
    name = f"{Path(source).stem}-{_digest(bytes(1).join((*texts, shlex.join(command).encode())))}"
    cache = _users_cache()
    for library in sorted(cache.glob(f"{name}-*.so")) if cache else []:
        with suppress(OSError):  # raised if it was compiled on a machine with another libc
            if _is_whole(library):
                return ctypes.CDLL(str(library))
    library = _built([*command, str(FOLDER / source)], name, _folder_for_builds())
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()
        raise


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_whole(library: Path) -> bool:
    """Return whether the file's checksum matches its name; a truncated library would crash the process."""
    return library.stem.rpartition("-")[2] == _digest(library.read_bytes())


def _built(command: list[str], name: str, folder: Path) -> Path:
    """Compile to `name`-CHECKSUM.so in `folder`, and return the path. Several processes may do this at the same time,
    because each process writes its own file and renames it when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "library.so"
        _run([*command, "-o", str(built), "-lm"])
        return built.replace(folder / f"{name}-{_digest(built.read_bytes())}.so")


def _run(command: list[str]) -> None:
    """Run a compiler; kill it together with its child processes if it takes longer than LIMIT_S."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdin=null, stdout=null, stderr=subprocess.PIPE, errors="replace", start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def _users_cache() -> Path | None:
    """Return the user's cache folder for compiled kernels, which may not exist yet; None if the user has no home
    folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3ae_kernels"
    except RuntimeError:
        return None


def _folder_for_builds() -> Path:
    """Return the user's cache folder. If it cannot be used, log a warning and return a temporary folder, which is
    removed when this process ends."""
    reason: object = "there is no home folder"
    cache = _users_cache()
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
            return cache
        except OSError as error:
            reason = error
    return _temporary_folder(str(reason))


@functools.cache
def _temporary_folder(reason: str) -> Path:
    _log.warning("C kernels are recompiled in each process because they cannot be cached: %s", reason)
    folder = Path(tempfile.mkdtemp(prefix="m3ae_kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
