"""The CPU kernels of GELU, linear layers and their gradients compared with float64, and the fallback without them."""

import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.cpu import build, linear, mlp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from m3ae_fast.model.transformer import MLP
from tests.helpers.amx import TILES_ANYWHERE

BF16 = torch.bfloat16
EXTREMES = (0.0, -0.0, 1e-30, 65.0, -65.0, 1e20, -1e20)


@pytest.fixture
def fresh_libraries():
    """Forget all loaded libraries before and after the test."""
    libraries = (build.load, mlp._library, linear._library, linear._product_library)
    for library in libraries:
        library.cache_clear()
    yield
    for library in libraries:
        library.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path, fresh_libraries):
    """Simulate a machine without a C compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/no/such/compiler")


@pytest.fixture(params=["AMX", "AVX-512"])
def products(request, monkeypatch, fresh_libraries):
    """Use each way of compiling the kernels of linear layers."""
    if BF16 not in build.DTYPES:
        pytest.skip("this CPU lacks products of bf16 pairs")
    monkeypatch.setattr(linear, "FLAGS", TILES_ANYWHERE if request.param == "AMX" else build.BF16)


@pytest.fixture
def threads():
    """Return a function that sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def values(dtype: torch.dtype) -> Tensor:
    """Return 1015 values. This number is not a multiple of the kernel's vector length."""
    torch.manual_seed(0)
    return torch.cat([3 * torch.randn(1001), torch.linspace(-9, 9, 7), torch.tensor(EXTREMES)]).to(dtype).view(5, 203)


@pytest.mark.parametrize("dtype", sorted(build.DTYPES, key=str), ids=str)
def test_gelu_equals_float64(dtype):
    x = values(dtype)
    exact = x.double().requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    y_exact = F.gelu(exact, approximate="tanh")
    y_exact.backward(grad.double())
    y, (dx, again) = mlp.gelu(x), mlp.gelu_gradient(grad, x)
    rounding = 2e-3 if dtype == BF16 else 2e-7  # half a unit of bf16's last place is 1/512
    usual = slice(None, -len(EXTREMES))
    assert y.dtype == dx.dtype == dtype and y.shape == dx.shape == x.shape
    assert torch.equal(again, y)
    assert relative(y.flatten()[usual], y_exact.flatten()[usual]) < rounding
    assert relative(dx, exact.grad) < rounding
    assert torch.allclose(y.double(), y_exact, rtol=3 * rounding, atol=1e-6)


def test_gelu_of_nan_is_nan():
    for dtype in build.DTYPES:
        x = torch.tensor([1.0, torch.nan, -1.0]).to(dtype)
        assert mlp.gelu(x).isnan().tolist() == [False, True, False]
        assert all(t.isnan().tolist() == [False, True, False] for t in mlp.gelu_gradient(torch.ones_like(x), x))


def test_gelu_accepts_any_strides():
    for dtype in build.DTYPES:
        x = values(dtype)
        across = x.t().contiguous().t()
        assert torch.equal(mlp.gelu(across), mlp.gelu(x))
        results = zip(mlp.gelu_gradient(across, across), mlp.gelu_gradient(x, x))
        assert all(torch.equal(a, b) for a, b in results)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(577, 96, 64), (1, 32, 32), (31, 64, 224), (300, 640, 1312)])
def test_weight_gradient_equals_float64(products, rows, outputs, inputs, threads):
    torch.manual_seed(0)
    grad = torch.randn(rows, outputs).to(BF16)
    x = torch.randn(rows, inputs + 8).to(BF16)[:, :inputs]  # with gaps between the rows
    results = []
    for count in (1, 3):
        threads(count)
        results.append(linear.weight_gradient(grad, x))
    weight, bias = results[0]
    assert relative(weight, grad.double().t() @ x.double()) < 1e-6
    assert relative(bias, grad.double().sum(0)) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*results)), "results do not depend on the number of threads"


def test_the_weight_gradient_of_transposed_rows_equals_float64(products):
    torch.manual_seed(0)
    grad, x = torch.randn(70, 64).to(BF16), torch.randn(70, 32).to(BF16)
    expected = linear.weight_gradient(grad, x)
    got = linear.weight_gradient(grad.t().contiguous().t(), x.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "depth", "width"), [(577, 96, 64), (1, 32, 32), (32, 2080, 288), (300, 640, 1312)])
def test_products_equal_float64(products, rows, depth, width, transposed, dtype, threads):
    torch.manual_seed(0)
    x = torch.randn(rows, depth + 8).to(BF16)[:, :depth]  # with gaps between the rows
    weight = torch.randn((width, depth) if transposed else (depth, width)).to(dtype)
    bias, hidden = torch.randn(width), 2 * torch.randn(rows, width).to(BF16)
    results = []
    for count in (1, 3):
        threads(count)
        plain = linear.product(x, weight, bias, transposed=transposed)
        before = linear.product(x, weight, bias, transposed=transposed, before_gelu=True)
        through = linear.product(x, weight, None, transposed=transposed, hidden_RN=hidden)
        results.append((plain[0], *before, *through))
    assert plain[1] is None and all(torch.equal(a, b) for a, b in zip(*results)), (
        "results do not depend on the number of threads"
    )
    # GELU is computed from the stored values, which are rounded, because the backward pass recomputes GELU from them
    assert torch.equal(before[1], mlp.gelu(before[0])) and torch.equal(through[1], mlp.gelu(hidden))
    rounded = weight.to(BF16).double()
    exact = x.double() @ (rounded.t() if transposed else rounded)
    leaf = hidden.double().requires_grad_()
    y_exact = F.gelu(leaf, approximate="tanh")
    y_exact.backward(exact)
    exact += bias.double()
    values = (exact, exact, F.gelu(exact, approximate="tanh"), leaf.grad, y_exact)
    for got, wanted in zip(results[0], values):
        assert got.dtype == BF16 and got.shape == wanted.shape
        assert relative(got, wanted) < 3e-3


def test_products_accept_any_strides(products):
    """One input at a time has gaps between its rows, or contiguous columns."""
    torch.manual_seed(0)
    x, weight, hidden = (torch.randn(shape).to(BF16) for shape in ((40, 64), (64, 96), (40, 96)))
    expected = linear.product(x, weight, None, transposed=False, hidden_RN=hidden)
    for number in range(3):
        tensors = [x, weight, hidden]
        for other in (F.pad(tensors[number], (0, 32))[:, :-32], tensors[number].t().contiguous().t()):
            a, b, c = *tensors[:number], other, *tensors[number + 1 :]
            got = linear.product(a, b, None, transposed=False, hidden_RN=c)
            assert all(torch.equal(one, right) for one, right in zip(got, expected))


def test_products_propagate_nan_only_to_its_row_or_column(products):
    x, weight = torch.ones(40, 32, dtype=BF16), torch.ones(32, 32)
    x[3, 5] = torch.nan
    hidden = torch.ones(40, 32, dtype=BF16)
    hidden[39, 31] = torch.nan
    out, _ = linear.product(x, weight, None, transposed=True)
    dx, y = linear.product(torch.ones_like(x), weight, None, transposed=False, hidden_RN=hidden)
    assert y is not None
    assert out.isnan().nonzero().tolist() == [[3, column] for column in range(32)]
    assert dx.isnan().nonzero().tolist() == y.isnan().nonzero().tolist() == [[39, 31]]


def step(layer, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, autocast: bool) -> list[Tensor]:
    """Return the output and the gradients of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [64, 40], ids=["a multiple of 32", "no multiple"])
@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast", "autocast of bf16"])
def test_linear_equals_torch(kind, size, compiled):
    torch.manual_seed(0)
    dtype = BF16 if kind == "bf16" else torch.float32
    x = torch.randn(90, 64, dtype=BF16 if "bf16" in kind else dtype)
    weight, bias = torch.randn(size, 64, dtype=dtype), torch.randn(size, dtype=dtype)
    grad = torch.randn(90, size).to(BF16)
    layer = torch.compile(linear.linear, backend="aot_eager", fullgraph=True) if compiled else linear.linear
    got = step(layer, x, grad, weight, bias, "autocast" in kind)
    expected = step(F.linear, x, grad, weight, bias, "autocast" in kind)
    exact = step(F.linear, *(t.double() for t in (x, grad, weight, bias)), False)
    for a, b, e in zip(got, expected, exact):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a, e) <= 1.5 * relative(b, e) + 1e-6


def plain_mlp(x, *parameters):
    return F.linear(F.gelu(F.linear(x, *parameters[:2]), approximate="tanh"), *parameters[2:])


def mlp_step(layer, x: Tensor, grad: Tensor, parameters: list[Tensor], autocast: bool = False) -> list[Tensor]:
    """Return the output and the gradients of all leaves that require one."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x.requires_grad_(), *parameters)]
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def mlp_inputs(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    shapes = ((size, 64), (size,), (96, size), (96,))
    parameters = [torch.randn(shape).div(shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]
    return torch.randn(90, 64), torch.randn(90, 96).to(BF16), parameters


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [64, 40], ids=["a multiple of 32", "no multiple"])
@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast", "autocast of bf16"])
def test_mlp_equals_torch(kind, size, compiled, mlp_dtypes):
    x, grad, parameters = mlp_inputs(size, BF16 if kind == "bf16" else torch.float32)
    x = x.to(BF16) if "bf16" in kind else x
    if (torch.float32 if kind == "float32" else BF16) not in mlp_dtypes:
        pytest.skip("this CPU lacks the instructions")
    layer = torch.compile(mlp.mlp, backend="aot_eager", fullgraph=True) if compiled else mlp.mlp
    got = mlp_step(layer, x, grad, parameters, "autocast" in kind)
    expected = mlp_step(plain_mlp, x, grad, parameters, "autocast" in kind)
    exact = mlp_step(plain_mlp, x.detach().double(), grad, [p.detach().double().requires_grad_() for p in parameters])
    for a, b, e in zip(got, expected, exact):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a, e) <= 1.5 * relative(b, e) + 1e-6


def test_the_mlp_op_passes_opcheck(mlp_dtypes):
    for dtype in mlp_dtypes:
        x, _, parameters = mlp_inputs(64, dtype)
        torch.library.opcheck(mlp.mlp_op.registered, (x.to(dtype).requires_grad_(), *parameters))


def test_the_mlp_uses_torch_for_unsupported_inputs():
    for x in (torch.randn(3, 64, dtype=torch.float64), torch.randn(3, 64).half()):
        parameters = [p.to(x.dtype) for p in mlp_inputs(64)[2]]
        assert mlp.mlp(x, *parameters) is None
    parameters = [p.double() for p in mlp_inputs(64)[2]]
    with torch.autocast("cpu", torch.bfloat16):  # does not change float64
        assert mlp.mlp(torch.randn(3, 64, dtype=torch.float64), *parameters) is None


@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast"])
@pytest.mark.parametrize("size", [64, 40], ids=["a multiple of 32", "no multiple"])
def test_empty_inputs_have_the_same_autograd_graph_as_others(kind, size, mlp_dtypes):
    """Ranks reduce gradients in the order in which they are computed, so a rank without rows must have the same order
    as the other ranks."""
    x, _, parameters = mlp_inputs(size, BF16 if kind == "bf16" else torch.float32)
    x = x.detach().to(parameters[0].dtype)
    for layer, count in ((linear.linear, 2), (mlp.mlp, 4)):
        graphs = []
        for rows in (x, x[:0]):
            leaves = [t.detach().clone().requires_grad_() for t in (rows, *parameters[:count])]
            with torch.autocast("cpu", BF16, enabled=kind == "autocast"):
                y = layer(*leaves)
            if y is None:
                pytest.skip("this CPU lacks the instructions")
            graphs.append((y.grad_fn.name(), [node.name() for node, _ in y.grad_fn.next_functions if node]))
            y.sum().backward()
        assert graphs[0] == graphs[1]
        assert y.shape == (0, len(parameters[count - 1])) and leaves[0].grad.shape == (0, 64)
        assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves[1:])


def test_only_the_input_of_gelu_is_saved_for_the_backward_pass(mlp_dtypes):
    for dtype in mlp_dtypes:
        x, _, parameters = mlp_inputs(64, dtype)
        y = mlp.mlp(x.to(dtype), *parameters)
        saved = sum(t.numel() for t in y.grad_fn.saved_tensors)
        assert saved == x.numel() + parameters[0].numel() + parameters[2].numel() + 90 * 64


def _within(event, other) -> bool:
    return other.start_ns() <= event.start_ns() < other.start_ns() + other.duration_ns()


def test_the_backward_pass_allocates_no_zeros_for_the_input_of_gelu(mlp_dtypes):
    """Only three tensors as large as the input of GELU are allocated: the gradients of the output and of the input of
    GELU, and the recomputed output. If the kernel of the product computes both gradients, they share one tensor. Copies
    in torch's own products and sums do not count."""
    rows, hidden = 4096, 256
    for dtype in mlp_dtypes:
        parameters = [torch.randn(shape).requires_grad_() for shape in ((hidden, 32), (hidden,), (32, hidden), (32,))]
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            y = mlp.mlp(torch.randn(rows, 32), *parameters)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            y.backward(torch.ones_like(y))
        events = profiled.profiler.kineto_results.events()
        by_torch = [event for event in events if event.name() in ("mkldnn::_linear_pointwise", "aten::sum")]
        copies = [event for event in events if event.name() in ("aten::clone", "aten::_to_copy")]
        copies = [copy for copy in copies if any(_within(copy, op) for op in by_torch)]
        made = [e for e in events if e.name() == "[memory]" and not any(_within(e, copy) for copy in copies)]
        sizes = [event.nbytes() for event in made]
        expected = 2 if linear.multiplies(y, parameters[2]) else 3
        assert sum(size >= rows * hidden * dtype.itemsize for size in sizes) == expected


def test_an_mlp_without_an_output_gradient_returns_no_gradients(mlp_dtypes):
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    x, _, parameters = mlp_inputs(64)
    (Dropped.apply(mlp.mlp(x, *parameters)).sum() + parameters[0].sum()).backward()
    assert parameters[0].grad.unique().tolist() == [1.0] and all(p.grad is None for p in parameters[1:])


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_inputs_of_an_mlp_require_no_computation_and_do_not_change_other_gradients(products, frozen):
    x, grad, parameters = mlp_inputs(64)
    x = x.to(BF16)
    whole = mlp_step(mlp.mlp, x, grad, parameters, autocast=True)
    leaves = [x, *parameters]
    leaves[frozen].requires_grad_(False)
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    with torch.autocast("cpu", BF16):
        mlp.mlp(*inputs).backward(grad)
    for i, (leaf, expected) in enumerate(zip(inputs, whole[1:])):
        assert leaf.grad is None if i == frozen else relative(leaf.grad, expected.double()) < 1e-6


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_models_mlp_equals_float64(autocast, gelu):
    torch.manual_seed(0)
    module = MLP(64, 40, gelu)
    x, grad = torch.randn(90, 64), torch.randn(90, 64)

    def exact(x):
        hidden = F.linear(x, module.fc1.weight.double(), module.fc1.bias.double())
        hidden = F.gelu(hidden, approximate="none" if gelu == "exact" else "tanh")
        return F.linear(hidden, module.fc2.weight.double(), module.fc2.bias.double())

    results = []
    for function, dtype in ((module, torch.float32), (exact, torch.float64)):
        leaf = x.clone().to(dtype).requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast and dtype == torch.float32):
            y = function(leaf)
        y.backward(grad.to(y.dtype))
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*results):
        assert relative(got, wanted) < (1e-2 if autocast else 1e-5)


def test_the_gradient_of_a_bias_without_weight_gradient_is_summed_in_float32():
    """The weight is frozen, so only the gradient of the bias is computed, from values in 16 bits."""
    torch.manual_seed(0)
    grad, x, weight = (1 + torch.rand(5000, 40)).to(BF16), torch.ones(5000, 8, dtype=BF16), torch.ones(40, 8)
    _, of_bias = linear.parameter_gradients(grad, x, weight, [False, True])
    assert of_bias is not None and of_bias.dtype == torch.float32
    assert relative(of_bias, grad.double().sum(0)) < 1e-6


def test_frozen_parameters_get_no_gradient(products):
    x, weight = torch.randn(40, 32).to(BF16), torch.randn(32, 32).to(BF16)
    for need_weight, need_bias in ((False, False), (False, True), (True, False)):
        w, b = weight.clone().requires_grad_(need_weight), torch.zeros(32, dtype=BF16).requires_grad_(need_bias)
        inputs = x.clone().requires_grad_()
        linear.linear(inputs, w, b).sum().backward()
        assert inputs.grad is not None
        assert (w.grad is not None, b.grad is not None) == (need_weight, need_bias)
        if need_bias:
            assert b.grad.tolist() == [40.0] * 32


def test_torch_is_used_if_there_is_no_compiler(no_compiler, caplog):
    x, grad = torch.randn(40, 64).to(BF16), torch.randn(40, 64).to(BF16)
    for dtype in build.DTYPES:
        before, upstream = (t.to(dtype) for t in torch.randn(2, 40, 64))
        exact = before.double().requires_grad_()
        F.gelu(exact, approximate="tanh").backward(upstream.double())
        assert torch.equal(mlp.gelu(before), F.gelu(before, approximate="tanh"))
        assert relative(mlp.gelu_gradient(upstream, before)[0], exact.grad) < (4e-3 if dtype == BF16 else 1e-6)
        assert "GELU runs on torch" in caplog.text
    if linear.FLAGS is not None:
        square = torch.randn(64, 64).to(BF16)
        assert torch.equal(linear.linear(x, square, square[0]), F.linear(x, square, square[0]))
        assert "linear layers run on torch" in caplog.text
        weight, bias = linear.weight_gradient(grad, x)
        assert relative(weight, grad.double().t() @ x.double()) < 4e-3
        assert relative(bias, grad.double().sum(0)) < 1e-6
        assert "torch computes the gradients of weights" in caplog.text
