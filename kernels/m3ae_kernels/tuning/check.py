"""Checks of the ops on the device against accurate results, for small odd sizes in three dtypes and for the inputs that
are timed.

Ops must also not synchronise with the host, and repeated results must be bitwise equal.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .workloads import ODD, Sizes, Workload, make

LIBRARY = sys.modules[__name__.rpartition(".tuning")[0]]  # this package; a copy from the Hub has another name
# The allowed error is twice that of plain torch in the same dtype, plus the error of rounding a result once.
FLOOR = {torch.float32: 5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
CHUNKS = 4  # number of chunks in which the reference processes the timed sizes, because its logits take gigabytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Check:
    """The result of checking an op at some sizes in one dtype: the largest ratio of the error to the allowed error, and
    a description of problems."""

    op: str
    sizes: str
    dtype: str
    worst: float
    problems: list[str]


def check_small(
    name: str, dtype: torch.dtype, device: torch.device, sizes: Sizes = ODD, module: Any = LIBRARY
) -> Check:
    """Check an op at odd sizes, which are not multiples of tiles, against float64."""
    work = make(name, sizes, dtype, device)
    upstream = work.upstream(work.call(reference))
    true = work.cast(torch.float64).run(reference, upstream)
    return _compare(work, "small, odd", true, work.run(reference, upstream), upstream, module)


def check_timed(work: Workload, module: Any = LIBRARY) -> Check:
    """Check an op on the inputs that will be timed, against float32 in chunks of rows."""
    upstream = work.upstream(work.call(module))
    true = work.cast(torch.float32).run_in_chunks(reference, upstream, CHUNKS)
    plain = work.run_in_chunks(reference, upstream, CHUNKS)
    return _compare(work, "timed", true, plain, upstream, module)


def _compare(
    work: Workload,
    sizes: str,
    true: dict[str, Tensor],
    plain: dict[str, Tensor],
    upstream: tuple[Tensor, ...],
    module: Any,
) -> Check:
    problems, worst = [], 0.0
    ours = work.run(module, upstream)
    for name, got in ours.items():
        allowed = 2 * _error(plain[name], true[name]) + FLOOR[got.dtype]
        ratio = _error(got, true[name]) / allowed
        worst = max(worst, ratio)
        if not ratio <= 1:
            problems.append(f"{name}: error {ratio * allowed:.1e}, allowed {allowed:.1e}")
    again = work.run(module, upstream)
    problems += [f"{name}: two runs differ" for name in ours if not torch.equal(ours[name], again[name])]
    if upstream[0].is_cuda:
        problems += _syncs(work, module, upstream)
    dtype = next(t.dtype for t in work.tensors.values() if t.requires_grad)
    return Check(work.name, sizes, str(dtype).removeprefix("torch."), worst, problems)


def _syncs(work: Workload, module: Any, upstream: tuple[Tensor, ...]) -> list[str]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run(module, upstream)
    except RuntimeError as error:
        return [f"waits for the device: {str(error).splitlines()[0]}"]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return []


def _error(got: Tensor, true: Tensor) -> float:
    """Return the relative error. It is computed in float64 and in parts, because the largest gradients have 50 million
    elements."""
    wrong = size = 0.0
    for g, t in zip(got.flatten().split(1 << 24), true.flatten().split(1 << 24)):
        wrong += (g.double() - t.double()).square().sum().item()
        size += t.double().square().sum().item()
    return (wrong / max(size, 1e-60)) ** 0.5
