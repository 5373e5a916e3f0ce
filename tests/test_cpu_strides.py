"""The layers of m3ae_kernels.cpu accept arguments of any layout, and the sizes and options of torch's layers."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.cpu import linear, mlp, norm
from torch import Tensor, nn

from tests.helpers.layouts import layouts

BF16 = torch.bfloat16


def results(function: Callable, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of all arguments."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        y = function(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30))


def norm_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm.layer_norm(x.to(BF16), weight, bias, 1e-6)


FUNCTIONS = {
    "linear": (linear.linear, [(6, 32), (64, 32), (64,)]),
    "mlp": (mlp.mlp, [(6, 32), (64, 32), (64,), (96, 64), (96,)]),
    "layer_norm": (norm_of, [(6, 32), (32,), (32,)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_of_any_layout_gives_the_result_of_its_copy(name, dtype, mlp_dtypes):
    function, shapes = FUNCTIONS[name]
    if name == "mlp" and dtype not in mlp_dtypes:
        pytest.skip("this CPU lacks the instructions")
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    for number, tensor in enumerate(tensors):
        for kind, other in layouts(tensor):
            before, after = tensors[:number], tensors[number + 1 :]
            expected = results(function, [*before, other.contiguous(), *after], dtype)
            for one, wanted in zip(results(function, [*before, other, *after], dtype), expected):
                assert relative(one, wanted) < 1e-5, (number, kind)


@pytest.fixture
def pointers(monkeypatch):
    """Replace the C kernels by functions that record the float32 vectors that they would read, by argument."""
    seen: dict[str, Tensor] = {}

    def read(address: int, size: int) -> Tensor:
        return torch.tensor((ctypes.c_float * size).from_address(address))

    def product(*arguments) -> int:
        seen["bias"] = read(arguments[2], arguments[9])
        return 1

    def norm_backward(*arguments) -> None:
        seen["weight"] = read(arguments[2], arguments[8])

    monkeypatch.setattr(linear, "_product_library", lambda: SimpleNamespace(linear=product))
    monkeypatch.setattr(norm, "_library", lambda: SimpleNamespace(backward=norm_backward))
    monkeypatch.setattr(norm, "DTYPES", {BF16})
    return seen


@pytest.mark.parametrize("kind", ["apart", "expanded"])
def test_c_kernels_read_contiguous_parameters(pointers, kind):
    """C kernels receive pointers without strides, so the parameters must be contiguous. The kernels are replaced, so
    this test runs on any CPU."""
    vector = dict(layouts(torch.arange(1.0, 65.0)))[kind]
    linear.product(torch.ones(4, 32, dtype=BF16), torch.ones(64, 32), vector, transposed=True)
    assert torch.equal(pointers["bias"], vector)
    x = torch.randn(4, 64).to(BF16).requires_grad_()
    norm.layer_norm(x, vector, torch.zeros(64), 1e-6).sum().backward()
    assert torch.equal(pointers["weight"], vector)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (2, 0, 32)], ids=str)
def test_layers_accept_any_leading_dimensions(shape, dtype):
    torch.manual_seed(0)
    for own, other in ((linear.Linear(32, 64), nn.Linear(32, 64)), (norm.LayerNorm(32), nn.LayerNorm(32))):
        other.load_state_dict(own.state_dict())
        for layer in (own, other):
            layer.to(dtype)
        x = torch.randn(shape, dtype=dtype)
        found = []
        for layer in (own, other):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.float().square().sum().backward()
            found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
        for one, wanted in zip(*found):
            torch.testing.assert_close(
                one, wanted, rtol=0.05 if dtype == BF16 else 1e-5, atol=0.1 if dtype == BF16 else 1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"), [(32, {"elementwise_affine": False}), (32, {"bias": False}), ((4, 8), {})], ids=str
)
def test_a_layer_norm_accepts_the_options_of_torch(shape, options, dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 8) if isinstance(shape, tuple) else torch.randn(5, 32)
    upstream, found = torch.randn_like(x), []
    for kind, precision in ((norm.LayerNorm, dtype), (nn.LayerNorm, torch.float64)):
        layer, leaf = kind(shape, **options).to(precision), x.clone().to(precision).requires_grad_()
        y = layer(leaf)
        y.backward(upstream.to(precision))
        found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for one, wanted in zip(*found, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), wanted, rtol=0.03, atol=0.03)


def test_a_linear_layer_without_bias_equals_torch():
    own = linear.Linear(32, 64, bias=False)
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(own(x), F.linear(x, own.weight))
    own(x).sum().backward()
    assert own.weight.grad is not None and x.grad is not None
