"""Attention on CPUs with AVX-512: attention.c, built by the system's C compiler when first needed.

Shapes: Q query rows, K key rows, H heads, D values a head.
"""

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
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3ae_fast.hardware import this_cpu

SOURCE = Path(__file__).with_name("attention.c")
_FLAGS = ["-O3", "-std=c11", "-shared", "-fPIC", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_NEEDS = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

_log = logging.getLogger(__name__)


def takes(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the kernels are here and work on such queries."""
    return device.type == "cpu" and head_dim % 16 == 0 and kernels(dtype) is not None


def forward(q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    """See `segment_attention`; where there are queries there must be keys."""
    q, k, v = (_rows(x) for x in (q_QHD, k_KHD, v_KHD))
    out_QHD = q.new_empty(q.shape)
    lse_QH1 = q.new_empty((*q.shape[:2], 1), dtype=torch.float32)
    _run("forward", q, k, v, cu_queries, cu_keys, out_QHD.data_ptr(), lse_QH1.data_ptr())
    return out_QHD, lse_QH1


def backward(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    lse_QH1: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `segment_attention_backward`."""
    grad, q, k, v = (_rows(x) for x in (grad_QHD, q_QHD, k_KHD, v_KHD))
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    rest = (grad.data_ptr(), grad.stride(0), lse_QH1.data_ptr(), *(x.data_ptr() for x in grads))
    _run("backward", q, k, v, cu_queries, cu_keys, *rest)
    return grads


def _rows(x_THD: Tensor) -> Tensor:
    """The kernels know one stride, that between rows."""
    return x_THD if x_THD.stride()[1:] == (x_THD.shape[2], 1) else x_THD.contiguous()


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, *rest: int) -> None:
    """All heads of all samples, on as many threads as torch has. They are Python's: torch's own wait for each other
    after every op, these once."""
    cu_queries, cu_keys = (cu.to(torch.int32).contiguous() for cu in (cu_queries, cu_keys))
    kernel = getattr(kernels(q.dtype), name)
    samples, heads = len(cu_queries) - 1, q.shape[1]
    pointers, strides = zip(*((x.data_ptr(), x.stride(0)) for x in (q, k, v)))
    task = ctypes.c_long(0)
    done: list[int] = []

    def work() -> None:
        ends = cu_queries.data_ptr(), cu_keys.data_ptr()
        done.append(kernel(*pointers, *strides, *ends, samples, heads, q.shape[2], *rest, ctypes.byref(task)))

    threads = [threading.Thread(target=work) for _ in range(min(torch.get_num_threads(), samples * heads) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if sum(done) <= len(threads):
        raise MemoryError("no memory for the scores of a sample")


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels; None for other types, where the CPU lacks the instructions, or without a C compiler."""
    cpu = this_cpu()
    if dtype == torch.float32 and cpu.flags >= _NEEDS:
        flags: list[str] = []
    elif dtype == torch.bfloat16 and cpu.flags >= _NEEDS | {"avx512_bf16"}:
        flags = ["-mavx512bf16", "-DBF16", *(["-DPAIRS"] if cpu.pairs else [])]
    else:
        return None
    try:
        library = ctypes.CDLL(str(_build(flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        _log.warning("attention runs on torch, at half the speed: %s cannot be built (%s)", SOURCE.name, *reason)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    inputs: list[Any] = [*[pointer] * 3, *[number] * 3, *[pointer] * 2, *[number] * 3]
    library.forward.argtypes = [*inputs, *[pointer] * 3]
    library.backward.argtypes = [*inputs, pointer, number, *[pointer] * 5]
    return library


def _build(flags: list[str]) -> Path:
    """Compile into the user's cache, unless that has been done. Raises OSError or CalledProcessError."""
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    command = [*compiler, *_FLAGS, *flags]
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3ae_fast"
    library = folder / f"attention-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # ranks may build at once: each moves a whole file
            built = Path(scratch) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True, text=True)
            built.replace(library)
    return library
