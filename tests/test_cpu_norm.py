"""The gradients of LayerNorm in 16 bits on a CPU, for which torch's own gradients have errors of several percent."""

import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.cpu import build, norm
from torch import Tensor

EPS = 1e-6


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def inputs(rows: int, width: int, dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
    """Return an upstream gradient, x, weight and bias."""
    torch.manual_seed(0)
    grad, x = (torch.randn(rows, width).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width).to(parameters) for _ in range(2))
    return [grad, 2 * x + 1, weight, bias]


def run(function, grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the leaves."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("by", ["kernel", "torch"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(3000, 96), (1, 32), (65, 37), (130, 520)])
def test_gradients_equal_float64(rows, width, dtype, parameters, by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(norm, "_library", lambda: None)
    grad, *leaves = inputs(rows, width, dtype, parameters)
    got = run(lambda *args: norm.layer_norm(*args, EPS), grad, *leaves)
    exact = run(
        lambda x, weight, bias: F.layer_norm(x, [width], weight, bias, EPS),
        *(tensor.double() for tensor in (grad, *leaves)),
    )
    rounding = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
    for one, wanted, expected in zip(got, exact, (dtype, dtype, parameters, parameters), strict=True):
        assert one.dtype == expected and one.shape == wanted.shape
        assert relative(one, wanted) < rounding[expected]


def test_second_derivatives_are_refused():
    _, x, *parameters = inputs(4, 8, torch.bfloat16, torch.float32)
    y = norm.layer_norm(x.requires_grad_(), *parameters, EPS)
    with pytest.raises(NotImplementedError, match="layer_norm does not support second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_results_do_not_depend_on_threads_or_strides():
    """norm.c sums blocks of rows in a fixed order. Without it, torch's order depends on the number of threads, so the
    sums differ by rounding."""
    grad, x, weight, _ = inputs(500, 64, torch.bfloat16, torch.float32)
    _, mean, rstd = torch.native_layer_norm(x, [64], weight, weight, EPS)
    expected = norm.layer_norm_gradients(grad, x, weight, mean, rstd)
    by_kernel = torch.bfloat16 in build.DTYPES and norm._library() is not None
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found = norm.layer_norm_gradients(grad, x, weight, mean, rstd)
            assert torch.equal(found[0], expected[0])
            for one, wanted in zip(found[1:], expected[1:]):
                assert torch.equal(one, wanted) if by_kernel else relative(one, wanted.double()) < 1e-6
    finally:
        torch.set_num_threads(threads)
    across = (tensor.t().contiguous().t() for tensor in (grad, x))
    assert all(map(torch.equal, norm.layer_norm_gradients(*across, weight, mean, rstd), expected))


def test_frozen_parameters_get_no_gradient():
    grad, x, weight, bias = inputs(8, 32, torch.bfloat16, torch.float32)
    x.requires_grad_()
    norm.layer_norm(x, weight, bias.requires_grad_(), EPS).backward(grad)
    assert x.grad is not None and bias.grad is not None and weight.grad is None
