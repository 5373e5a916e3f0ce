"""Every op on the device against float64 in three dtypes; that it never waits for the host, and repeats itself."""

from dataclasses import dataclass

import m3ae_kernels
import torch
from m3ae_kernels import reference

from .workloads import ODD, Sizes, workloads

# Twice the error of plain torch in the same dtype, and what rounding a result once may cost.
FLOOR = {torch.float32: 5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


@dataclass
class Check:
    """One op in one dtype: the worst ratio of error to what is allowed, and what went wrong."""

    op: str
    dtype: str
    worst: float
    problems: list[str]


def check_all(device: torch.device, sizes: Sizes = ODD, module=m3ae_kernels) -> list[Check]:
    return [
        _check(work, dtype, module)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for work in workloads(sizes, dtype, device)
    ]


def _check(work, dtype: torch.dtype, module) -> Check:
    problems, worst = [], 0.0
    upstream = work.upstream(work.call(reference).detach())
    true = work.double().run(reference, upstream)
    plain = work.run(reference, upstream)
    ours = work.run(module, upstream)
    for name, got in ours.items():
        allowed = 2 * _error(plain[name], true[name]) + FLOOR[got.dtype]
        ratio = _error(got, true[name]) / allowed
        worst = max(worst, ratio)
        if not ratio <= 1:
            problems.append(f"{name}: error {ratio * allowed:.1e}, allowed {allowed:.1e}")
    again = work.run(module, upstream)
    problems += [f"{name}: two runs differ" for name in ours if not torch.equal(ours[name], again[name])]
    if upstream.is_cuda:
        problems += _syncs(work, module, upstream)
    return Check(work.name, str(dtype).removeprefix("torch."), worst, problems)


def _syncs(work, module, upstream: torch.Tensor) -> list[str]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run(module, upstream)
    except RuntimeError as error:
        return [f"waits for the device: {str(error).splitlines()[0]}"]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return []


def _error(got: torch.Tensor, true: torch.Tensor) -> float:
    return ((got.double() - true).norm() / true.norm().clamp(min=1e-30)).item()
