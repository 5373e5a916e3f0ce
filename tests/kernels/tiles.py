"""Ragged cases with the block sizes that ship for an H100, and unwritten memory poisoned. Run by
test_kernel_interpreter.py: only Triton's interpreter can."""

import m3ae_kernels
import pytest
import torch
from m3ae_kernels import reference, tuning

from tests.kernels.kernel_cases import make, run
from tests.kernels.test_kernel_ops import FLOOR, double, error, poisoned  # noqa: F401

ARCH = "sm_90"
RAGGED = (
    "attend-some",
    "attend-queries",
    "residual-some",
    "embed-p14",
    "embed-last",
    "norm-some",
    "scatter-mask",
    "pixel-norm",
    "pixel-mean-last",
    "token-z",
    "token-rows",
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", RAGGED)
def test_shipped_tiles(case, dtype, monkeypatch, poisoned):  # noqa: F811
    monkeypatch.setattr(tuning, "arch_of", lambda device: ARCH)
    inputs = make(case, dtype)
    true, torch_like = run(reference, case, double(inputs)), run(reference, case, inputs)
    for name, got in run(m3ae_kernels, case, inputs).items():
        allowed = 2 * error(torch_like[name], true[name]) + FLOOR[got.dtype]
        assert error(got, true[name]) <= allowed, name


def test_the_tiles_are_others_than_the_interpreters():
    for kernel, widths in tuning.table(ARCH).items():
        own = tuning.table(tuning.INTERPRETER)[kernel]
        assert widths != own, kernel
