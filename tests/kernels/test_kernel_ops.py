"""Every op, compared with float64, and the guarantees of the library.

The tests run on the torch implementations. test_kernel_interpreter.py runs this file again on the Triton
implementations."""

import importlib
import os

import m3ae_kernels
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from m3ae_kernels import reference
from m3ae_kernels.pixels import LARGEST
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.layouts import SHARED, layouts
from tests.helpers.triton_kernels import import_kernels
from tests.kernels.kernel_cases import BAND_MEAN, BAND_STD, CASES, SMALL, Inputs, call, make, run

TRITON = os.environ.get("M3AE_KERNELS_IMPL") == "triton"
# The interpreter's products are wrong in bfloat16: it multiplies the bits.
LOW = [torch.float16] if TRITON else [torch.float16, torch.bfloat16]
FEW = (*SMALL, "norm-no-bias", "scatter-mask", "token-mean") if TRITON else tuple(CASES)  # the interpreter is slow
# Maximum error from rounding the result once, or from summing a few float32 terms in another order.
FLOOR = {torch.float16: 2.5e-4, torch.bfloat16: 2e-3, torch.float32: 3e-7, torch.float64: 1e-15}


def error(got: Tensor, true: Tensor) -> float:
    """Return the distance relative to the norm of the true tensor."""
    assert got.shape == true.shape
    return ((got.double() - true).norm() / true.norm().clamp(min=1e-30)).item() if true.numel() else 0.0


def double(inputs: Inputs) -> Inputs:
    return inputs.to(torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_torch(case, dtype):
    inputs = make(case, dtype)
    true = run(reference, case, double(inputs))
    torch_like = run(reference, case, inputs)
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert torch.isfinite(got).all()
        if name in inputs.tensors:
            assert got.dtype == inputs.tensors[name].dtype
        allowed = 2 * error(torch_like[name], true[name]) + FLOOR[got.dtype]
        assert error(got, true[name]) <= allowed, name


@pytest.mark.parametrize("case", [c for c in CASES if "vocab" not in c and "p32" not in c])
def test_float64(case):
    inputs = make(case, torch.float64)
    true = run(reference, case, double(inputs))
    # The kernels take scale, shift and eps as float32.
    tolerance = 3e-7 if TRITON else 1e-12
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert got.dtype == torch.float64
        assert error(got, true[name]) <= tolerance, name


@pytest.mark.parametrize(
    "case, sizes",
    [
        ("attend-queries", {"lengths": (1, 2), "heads": 1, "dim": 1, "queries": (1, 1)}),
        ("attend-some", {"lengths": (2, 1), "heads": 1, "dim": 1}),
        ("embed-float", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "floating": True}),
        ("embed-bands-float", {"rows": 2, "dim": 2, "batch": 1, "channels": 13, "patch": 1, "floating": True}),
        ("gather-some", {"tokens": 5, "rows": 3, "dim": 2}),
        ("norm-some", {"tokens": 5, "rows": 3, "dim": 4, "norm": True}),
        ("scatter-mask", {"tokens": 6, "rows": 4, "dim": 2, "fill": 2, "table": 3}),
        ("pixel-norm", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "norm_pix": True}),
        ("pixel-bands", {"rows": 2, "dim": 2, "batch": 1, "channels": 13, "patch": 1, "pixels": torch.uint16}),
        ("pixel-rows", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "reduction": "none"}),
        ("pixel-mean-last", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "reduction": "mean"}),
        ("hog-rows", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "reduction": "none"}),
        ("hog-mean-last", {"rows": 3, "dim": 2, "batch": 1, "channels": 1, "patch": 2, "reduction": "mean"}),
        ("token-z", {"rows": 3, "dim": 2, "vocab": 5, "label_smoothing": 0.1, "z_loss": 0.1}),
        ("token-mean", {"rows": 4, "dim": 2, "vocab": 5, "ignored": True, "z_loss": 0.1, "reduction": "mean"}),
        ("token-rows", {"rows": 4, "dim": 2, "vocab": 5, "ignored": True, "label_smoothing": 0.1, "reduction": "none"}),
    ],
)
def test_gradcheck(case, sizes):
    torch.manual_seed(0)
    inputs = CASES[case][0](torch.float64, **sizes)
    if "row_weight" in inputs.tensors:
        inputs.tensors["row_weight"] = inputs.tensors["row_weight"].double().requires_grad_()
    names = inputs.learned

    def function(*tensors: Tensor) -> Tensor:
        return call(m3ae_kernels, case, Inputs(inputs.tensors | dict(zip(names, tensors)), inputs.options))

    # The kernels' float32 constants do not matter, because both sides of gradcheck use them.
    learned = [inputs.tensors[name] for name in names]
    # If there are many inputs or the interpreter is slow, gradients are checked along random directions, which also
    # reveal a wrong entry.
    assert torch.autograd.gradcheck(function, learned, fast_mode=TRITON or "bands" in case)


def upstreams(out: Tensor) -> dict[str, Tensor]:
    """Return upstream gradients with the layouts that autograd may pass."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    if out.dim() == 0:
        return {
            "scaled": values * 1024,
            "of a slice": torch.stack([values, values])[1],
            "expanded": values.reshape(1).expand(3)[2],
        }
    return {
        "scaled": values * 1024,
        "transposed": values.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.cat([values, values], -1)[..., out.shape[-1] :],
        "strided": torch.stack([values, values], -1)[..., 1],
        "expanded rows": values[:1].expand(out.shape),
        "one number": values.flatten()[0].expand(out.shape),
    }


@pytest.mark.parametrize("case", SMALL)
def test_any_upstream_gradient(case):
    inputs = make(case, torch.float32)
    for kind, upstream in upstreams(call(m3ae_kernels, case, inputs).detach()).items():
        true = run(reference, case, double(inputs), upstream)
        for name, got in run(m3ae_kernels, case, inputs, upstream).items():
            assert error(got, true[name]) < 2e-6, (kind, name)


STRIDED = (
    "attend-some", "attend-queries", "embed-p16", "embed-one", "gather-some", "norm-some",
    "scatter-mask", "pixel-p16", "pixel-one", "hog-p16", "token-some",
)  # fmt: skip


@pytest.mark.parametrize("case", STRIDED)
def test_inputs_of_any_stride(case):
    """Transposed, sliced and offset inputs, each with its own strides, give the results of contiguous ones."""
    inputs = make(case, torch.float32)
    expected = run(m3ae_kernels, case, inputs)

    def awkward(t: Tensor, number: int, across: bool) -> Tensor:
        if t.dim() == 1:
            return torch.stack([t] * (2 + number), 1)[:, 1]
        if t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if across:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return F.pad(t, (1 + number, 0))[..., 1 + number :]

    for parity in (0, 1):
        strided = {
            name: awkward(t.detach(), i, (i + parity) % 2 == 1).requires_grad_(t.requires_grad)
            for i, (name, t) in enumerate(inputs.tensors.items())
        }
        for name, got in run(m3ae_kernels, case, Inputs(strided, inputs.options)).items():
            assert error(got, expected[name].double()) < 1e-6, (name, parity)


@pytest.mark.parametrize("kind", ["apart", "offset", "across", *SHARED])
@pytest.mark.parametrize("case", SMALL)
def test_inputs_of_each_layout_give_the_results_of_their_copies(case, kind):
    """Ids must be distinct, so they are not given a layout in which elements share memory."""
    inputs = make(case, torch.float32)
    results = []
    for copied in (True, False):
        tensors = dict(inputs.tensors)
        for name, t in tensors.items():
            is_id = t is not None and t.dtype in (torch.int32, torch.int64)
            if t is not None and not (is_id and kind in SHARED):
                other = dict(layouts(t.detach())).get(kind, t.detach())
                tensors[name] = (other.contiguous() if copied else other).requires_grad_(t.requires_grad)
        results.append(run(m3ae_kernels, case, Inputs(tensors, inputs.options)))
    expected, found = results
    for name, got in found.items():
        assert error(got, expected[name].double()) < 1e-6, name


@pytest.mark.parametrize("case", SMALL)
def test_repeated_and_partial_backward_passes_give_the_same_gradients(case):
    """A second backward pass gives the same gradients, and so does a pass that requires a single gradient."""
    inputs = make(case, torch.float32)
    expected = run(m3ae_kernels, case, inputs)
    out = call(m3ae_kernels, case, inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    names = inputs.learned
    for _ in range(2):
        grads = torch.autograd.grad(out, [inputs.tensors[n] for n in names], upstream, retain_graph=True)
        assert all(torch.equal(g, expected[n]) for n, g in zip(names, grads))
    for only in names:
        alone = {n: t.detach().requires_grad_(n == only) if n in names else t for n, t in inputs.tensors.items()}
        assert torch.equal(run(m3ae_kernels, case, Inputs(alone, inputs.options))[only], expected[only])


@pytest.mark.parametrize("case", FEW)
def test_two_runs_are_bitwise_equal(case):
    first, second = (run(m3ae_kernels, case, make(case, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", SMALL)
def test_no_grad_gives_the_same_result(case):
    inputs = make(case, torch.float32)
    expected = call(m3ae_kernels, case, inputs)
    with torch.no_grad():
        got = call(m3ae_kernels, case, inputs)
    assert expected.requires_grad and not got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", [c for c in SMALL if c != "gather-some"])
@pytest.mark.parametrize("other", LOW, ids=str)
def test_mixed_dtypes(case, other):
    """The dtype of the weights may be wider or narrower than that of the activations. Outputs have the dtype of the
    activations, and each gradient has the dtype of its tensor."""
    activations = {"x", "branch", "q", "qkv", "hidden", "images", "row_weight"}
    for outer, inner in ((torch.float32, other), (other, torch.float32)):
        inputs = make(case, torch.float32)
        inputs = inputs.to(outer, [n for n in inputs.learned if n in activations])
        inputs = inputs.to(inner, [n for n in inputs.learned if n not in activations])
        true = run(reference, case, double(inputs))
        results = run(m3ae_kernels, case, inputs)
        assert results["out"].dtype == (torch.float32 if "loss" in CASES[case][0].__name__ else outer)
        for name, got in results.items():
            assert name == "out" or got.dtype == inputs.tensors[name].dtype
            assert error(got, true[name]) < (0.02 if other == torch.bfloat16 else 3e-3), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_autocast(case, dtype):
    """Matmuls are computed in the dtype of autocast. Outputs have the dtypes that torch's Linear and Embedding return,
    and gradients have the dtypes of the inputs."""
    inputs = make(case, torch.float32)
    true = run(reference, case, double(inputs))
    with torch.autocast("cpu", dtype=dtype):
        results = run(m3ae_kernels, case, inputs)
    assert results["out"].dtype == (dtype if case.startswith(("embed", "attend")) else torch.float32)
    matmul = case.split("-")[0] in ("embed", "pixel", "token")
    for name, got in results.items():
        assert name == "out" or got.dtype == torch.float32
        distance = error(got, true[name])
        assert distance < (0.02 if dtype == torch.bfloat16 else 3e-3), name
        if matmul and name == "weight":
            assert distance > 1e-5, "the matmul did not run in autocast's dtype"


# Autocast acts before an op chooses its implementation, so one case is enough with the slow interpreter.
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("autocast", [True] if TRITON else [False, True])
def test_compile_equals_eager(case, autocast):
    inputs = make(case, torch.float32)
    learned = [inputs.tensors[n] for n in inputs.learned]

    def function(tensors: dict[str, Tensor]) -> Tensor:
        return call(m3ae_kernels, case, Inputs(tensors, inputs.options))

    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=LOW[0], enabled=autocast):
        eager = function(inputs.tensors)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(inputs.tensors)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager.sum(), learned), torch.autograd.grad(compiled.sum(), learned)):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_inductor_equals_eager():
    """Several ops are in one compiled graph, with Inductor's own kernels between them."""
    torch.manual_seed(0)
    pixels = {"patch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    embed = m3ae_kernels.PatchEmbed(16, **pixels)
    heads = m3ae_kernels.M3AEHeads(16, 31, **pixels)
    table = torch.randn(12, 16, requires_grad=True)
    images, ids = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8), torch.randperm(12)
    targets = {"images": images, "patch_ids": ids[:6], "targets": torch.randint(0, 31, (6,))}
    rows = {"image_rows": torch.arange(6), "text_rows": torch.arange(6, 12)}

    def losses() -> Tensor:
        x = m3ae_kernels.scatter_tokens(embed(images, ids), ids, table=table, table_ids=ids.flip(0))
        x = m3ae_kernels.gather_tokens(torch.tanh(x), ids)
        sums = heads(x, **rows, **targets)
        return sums.image + sums.text

    learned = [table, *embed.parameters(), *heads.parameters()]
    torch._dynamo.reset()
    eager, compiled = losses(), torch.compile(losses, fullgraph=True)()
    assert torch.allclose(eager, compiled, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(eager, learned), torch.autograd.grad(compiled, learned)):
        assert error(b, a.double()) < 2e-6


@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16, torch.float64], ids=str)
def test_patch_embed_of_thirteen_channels_equals_a_convolution(pixels):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(13, 8, 4, 4).double()
    values = torch.rand(2, 13, 8, 12, dtype=torch.float64)
    images = values if pixels.is_floating_point else (values * LARGEST[pixels]).to(pixels)
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (BAND_MEAN, BAND_STD))
    if pixels.is_floating_point:
        images.requires_grad_()
    normalised = (images.double() / LARGEST.get(pixels, 1) - mean) / std
    expected = conv(normalised).flatten(2).transpose(1, 2).flatten(0, 1)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    got = m3ae_kernels.patch_embed(
        images, torch.arange(12), weight, conv.bias, patch_size=4, mean=BAND_MEAN, std=BAND_STD
    )
    learned = [conv.weight, conv.bias, *([images] if images.requires_grad else [])]
    upstream = torch.randn_like(got)
    gradients = (torch.autograd.grad(out, learned, upstream) for out in (got, expected))
    for a, b in zip([got, *next(gradients)], [expected, *next(gradients)]):
        assert error(a, b) <= (3e-7 if TRITON else 1e-13)


@pytest.fixture
def poisoned():
    """Let torch fill uninitialised memory with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", FEW)
def test_unwritten_memory_is_never_read(case, poisoned):
    inputs = make(case, torch.float32)
    true = run(reference, case, double(inputs))
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert error(got, true[name]) < 3e-6, name


def test_changing_row_counts_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m3ae_kernels.gather_tokens, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5, 8):
        x = torch.randn(rows + 2, 8, requires_grad=True)
        compiled(x, torch.arange(rows).int()).sum().backward()
        assert x.grad.sum() == rows * 8
    assert counter.frame_count == 1


def test_the_number_of_parts_of_qkv_may_be_symbolic():
    """With dynamic=True, the size 3 of queries, keys and values is symbolic."""
    torch._dynamo.reset()
    qkv, ends = torch.randn(5, 3, 1, 16), torch.tensor([0, 2, 5])
    compiled = torch.compile(m3ae_kernels.packed_attention, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(compiled(qkv, ends, 3), m3ae_kernels.packed_attention(qkv, ends, 3))


def ops(case: str, inputs: Inputs):
    """Return the registered ops that a case calls, and their arguments."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "m3ae":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        run(m3ae_kernels, case, inputs)
    return calls


@pytest.mark.parametrize("case", SMALL)
def test_opcheck(case):
    calls = ops(case, make(case, torch.float32))
    assert calls
    for func, args in calls:
        # The arguments were recorded below autograd, so requires_grad is set again.
        args = [
            a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        ]
        tests = list(torch.library.opcheck.__kwdefaults__["test_utils"])
        if TRITON:  # the other checks use only the registration
            tests = ["test_schema", "test_faketensor"]
        if "backward" in func.name():  # the backward op has no gradient formula
            tests = [name for name in tests if name != "test_autograd_registration"]
            args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(func, tuple(args), test_utils=tests)


@pytest.mark.parametrize("case", SMALL)
def test_partial_gradients_have_the_shapes_declared_to_compilers(case):
    inputs = make(case, torch.float32)
    for only in inputs.learned:
        alone = {
            n: t.detach().requires_grad_(n == only) if n in inputs.learned else t for n, t in inputs.tensors.items()
        }
        calls = ops(case, Inputs(alone, inputs.options))
        assert calls
        for func, args in calls:
            torch.library.opcheck(func, args, test_utils="test_faketensor")


def largest_allocation(case: str, inputs: Inputs) -> int:
    """Return the number of bytes of the largest allocation in a run. Allocations inside the op are included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run(m3ae_kernels, case, inputs)
    return max(event.self_cpu_memory_usage for event in record.events())


@pytest.mark.parametrize(("case", "module"), [("norm-some", "gather"), ("embed-p14", "patch_embed")])
def test_results_do_not_depend_on_the_number_of_row_chunks(case, module, monkeypatch):
    inputs = make(case, torch.float32)
    monkeypatch.setattr(importlib.import_module(f"m3ae_kernels.{module}"), "CHUNK_ROWS", 13)
    true = run(reference, case, double(inputs))
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert error(got, true[name]) < 1e-6, name


def test_losses_never_store_all_logits_or_predictions(monkeypatch):
    """In chunks of a few rows, the result is the same, and no tensor [M, V] or [M, K] is allocated."""
    folder = "m3ae_kernels.triton_impl" if TRITON else "m3ae_kernels"
    pixel = importlib.import_module(f"{folder}.pixel_loss")
    rows, vocab, patch = 133 if TRITON else 401, 193, 192
    torch.manual_seed(0)
    token_inputs = CASES["token-z"][0](torch.float32, rows, dim=16, vocab=vocab, label_smoothing=0.1, z_loss=0.01)
    pixel_inputs = CASES["pixel-p16"][0](torch.float32, rows, dim=16, batch=67, channels=3, patch=8)
    cases = (("token-z", token_inputs, vocab), ("pixel-p16", pixel_inputs, patch))
    whole = {}
    for case, inputs, width in cases:
        whole[case] = run(m3ae_kernels, case, inputs)
        # With a single chunk, such a tensor is allocated, which shows that the measurement works.
        assert largest_allocation(case, inputs) >= 4 * rows * width
    token_inputs.options["workspace"] = 4 * (48 if TRITON else 97) * 256
    if TRITON:
        monkeypatch.setattr(pixel, "WORKSPACE_BYTES", 4 * 64 * patch)
    else:
        monkeypatch.setattr(importlib.import_module("m3ae_kernels.token_loss"), "SOFTMAX_BYTES", 4 * 23 * vocab)
        monkeypatch.setattr(pixel, "CHUNK_ROWS", 97)
    for case, inputs, width in cases:
        for name, got in run(m3ae_kernels, case, inputs).items():
            assert error(got, whole[case][name].double()) < 1e-6, name
        assert largest_allocation(case, inputs) < 4 * rows * width / 2


@pytest.mark.parametrize("case", ["token-z", "pixel-p16"])
def test_gradient_chunks_are_accumulated_in_float32(case, monkeypatch):
    """In float16, a sum over many chunks would lose digits that each chunk still has."""
    folder = "m3ae_kernels.triton_impl" if TRITON else "m3ae_kernels"
    pixel = importlib.import_module(f"{folder}.pixel_loss")
    torch.manual_seed(0)
    sizes = {"vocab": 48} if case == "token-z" else {"batch": 24, "channels": 3, "patch": 4}
    inputs = CASES[case][0](torch.float16, 144, dim=16, **sizes).to(torch.float32, ["weight", "bias"])
    hidden, bias = inputs.tensors["hidden"], inputs.tensors["bias"]
    inputs.tensors |= {"hidden": hidden.detach().abs().requires_grad_(), "bias": (bias.detach() + 4).requires_grad_()}
    true = run(reference, case, double(inputs))
    whole = error(run(m3ae_kernels, case, inputs)["weight"], true["weight"])
    inputs.options |= {"workspace": 2 * 4 * 64} if case == "token-z" else {}
    if TRITON:
        monkeypatch.setattr(pixel, "WORKSPACE_BYTES", 2 * 4 * 48)
    else:
        monkeypatch.setattr(pixel, "CHUNK_ROWS", 4)
    assert error(run(m3ae_kernels, case, inputs)["weight"], true["weight"]) < 1.2 * whole


def test_rows_of_16_bits_that_nearly_cancel_are_summed_in_float32():
    """Each half of the gradient of a table row has more digits than float16 can represent, but their sum does not."""
    values = torch.cat((torch.full((250, 8), 9 + 2**-7), torch.full((250, 8), -9.0))).half()
    x, table = torch.zeros(1, 8).half(), torch.zeros(1, 8).half().requires_grad_()
    src, ids = torch.full((500,), -1), torch.zeros(500, dtype=torch.int64)
    m3ae_kernels.scatter_tokens(x, src, table=table, table_ids=ids).backward(values)
    assert (table.grad == 250 / 2**7).all()


def test_negative_indices_select_no_row():
    case = "scatter-long"
    inputs = make(case, torch.float32)
    names = ("src", "fill_ids", "table_ids")
    for name in names:
        inputs.tensors[name][::3] = -1
    expected = run(m3ae_kernels, case, inputs)
    for number, name in enumerate(names):
        inputs.tensors[name][::3] = -100 - number
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert torch.equal(got, expected[name]), name


def test_a_prediction_is_correct_only_if_its_target_is_the_first_maximum():
    hidden = torch.zeros(4, 8)
    bias = torch.zeros(1200)
    bias[[515, 3, 1027]] = 2.0  # three equal maxima in three tiles, all in the same lane
    targets = torch.tensor([3, 515, 1027, 0], dtype=torch.int32)
    weight = torch.zeros(1200, 8)
    options = {"row_weight": torch.ones(4), "reduction": "sum", "return_correct": True}
    _, correct = m3ae_kernels.masked_token_loss(hidden, weight, targets, bias=bias, **options)
    assert correct.tolist() == [True, False, False, False]
    _, correct = m3ae_kernels.masked_token_loss(hidden, weight, targets * 0, **options)
    assert correct.all()


@pytest.mark.parametrize("scale", [1e-7, -1e4] if TRITON else [1e-7, 1e4, -1e-7, -1e4])
def test_row_weights_of_any_magnitude_in_float16(scale):
    """Row weights far from 1 neither underflow nor overflow in the stored gradients. A loss scale compensates for the
    weight of 1e-7."""
    for case in ("pixel-p16", "hog-p16", "token-some"):
        inputs = make(case, torch.float16)
        upstream = torch.tensor(1.0)
        expected = run(m3ae_kernels, case, inputs, upstream)
        inputs.tensors["row_weight"] = inputs.tensors["row_weight"] * scale
        got = run(m3ae_kernels, case, inputs, upstream / scale)
        for name in inputs.learned:
            assert error(got[name], expected[name].double()) < 1e-3, name


def test_row_weights_have_gradients_and_may_all_be_zero():
    for case in ("pixel-p16", "hog-p16", "token-z"):
        inputs = make(case, torch.float32)
        inputs.tensors["row_weight"].requires_grad_()
        true = run(reference, case, double(inputs))
        assert error(run(m3ae_kernels, case, inputs)["row_weight"], true["row_weight"]) < 1e-6
        inputs.tensors["row_weight"] = torch.zeros_like(inputs.tensors["row_weight"])
        assert all((got == 0).all() for got in run(m3ae_kernels, case, inputs).values())


def test_large_logits_stay_finite():
    inputs = make("token-some", torch.float32)
    inputs.tensors["bias"] = (inputs.tensors["bias"].detach() * 1e4).requires_grad_()
    true = run(reference, "token-some", double(inputs))
    for name, got in run(m3ae_kernels, "token-some", inputs).items():
        assert torch.isfinite(got).all()
        assert error(got, true[name]) < 2e-3, name


def test_offsets_beyond_2_to_the_31_are_supported():
    """The op reads the last row of a tensor of more than 2^31 elements; only this row is ever touched."""
    x = torch.empty(2**31 // 512 + 3, 512, dtype=torch.float16)
    x[-1] = torch.arange(512)
    rows = torch.tensor([len(x) - 1], dtype=torch.int32)
    assert torch.equal(m3ae_kernels.gather_tokens(x, rows), x[-1:])
    images = torch.empty(2**31 // (3 * 64 * 64) + 2, 3, 64, 64, dtype=torch.uint8)
    images[-1] = 7
    weight, bias = torch.ones(16, 8 * 8 * 3), torch.zeros(16)
    ids = torch.tensor([len(images) * 64 - 1], dtype=torch.int32)
    out = m3ae_kernels.patch_embed(images, ids, weight, bias, patch_size=8, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.allclose(out, torch.full((1, 16), 7.0 * 8 * 8 * 3))


def test_modules_equal_the_ops_with_their_weights():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ids, weight = torch.tensor([5, 0, 3], dtype=torch.int32), torch.rand(3)
    pixels = {"patch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    embed = m3ae_kernels.PatchEmbed(12, **pixels)
    head = m3ae_kernels.MaskedPixelLoss(12, norm_pix=True, reduction="sum", **pixels)
    gradients = m3ae_kernels.MaskedHogLoss(12, patch_size=8, reduction="sum")
    tokens = m3ae_kernels.MaskedTokenLoss(12, 31, reduction="sum", label_smoothing=0.1, z_loss=0.01)
    norm = m3ae_kernels.GatherNorm(12)
    hidden = embed(images, ids)
    assert torch.equal(hidden, m3ae_kernels.patch_embed(images, ids, embed.weight, embed.bias, **pixels))
    assert norm(hidden, torch.tensor([2, 0], dtype=torch.int32)).shape == (2, 12)
    loss = head(hidden, images, ids, weight)
    target = reference.patches(images, 8, (0.5,) * 3, (0.25,) * 3, torch.float32)[ids.long()]
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    by_hand = ((head.predict(hidden) - target).square().mean(1) * weight).sum()
    assert torch.allclose(loss, by_hand)
    hog_loss = gradients(hidden, images, ids, weight)
    target = m3ae_kernels.hog_targets(images, ids, patch_size=8)
    assert torch.allclose(hog_loss, ((gradients.predict(hidden) - target).square().mean(1) * weight).sum())
    text_loss, correct = tokens(hidden, ids, weight, return_correct=True)
    assert torch.equal(tokens.predict(hidden).argmax(1) == ids, correct)
    (loss + hog_loss + text_loss).backward()
    for module in (embed, head, gradients, tokens):
        assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        bound = (6 / sum(module.weight.shape)) ** 0.5
        assert 0.9 * bound < module.weight.abs().max() <= bound
        assert (module.bias == 0).all()


@pytest.mark.parametrize("vocab", [53, None])
def test_m3ae_heads_equal_the_combination_of_their_parts(vocab):
    """The module and the parts of the reference agree in value and in all gradients, including those of hidden
    layers."""
    torch.manual_seed(0)
    pixels = {"patch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    options = {"norm_pix": True, "label_smoothing": 0.1, "z_loss": 0.01}
    mlps = {"image_mlp": torch.nn.Linear(16, 16), "text_mlp": torch.nn.Linear(16, 16) if vocab else None}
    heads = m3ae_kernels.M3AEHeads(16, vocab, **pixels, **options, **mlps)
    for p in heads.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(23, 16, requires_grad=True)
    order = torch.randperm(23).int()
    rows = {"image_rows": order[:7], "text_rows": order[7:18]}
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    patch_ids, image_weight = torch.randperm(12)[:7].int(), torch.rand(7)
    targets, text_weight = torch.randint(0, vocab or 1, (11,)), torch.rand(11)
    image_batch = {"images": images, "patch_ids": patch_ids, "image_row_weight": image_weight}
    text_batch = {"targets": targets, "text_row_weight": text_weight}
    got = heads(x, **rows, **image_batch, **text_batch)

    def hidden(which: Tensor, mlp: torch.nn.Module) -> Tensor:
        return mlp(reference.gather_tokens(x, which, norm_weight=heads.norm.weight, norm_bias=heads.norm.bias))

    image_head, text_head = heads.image_head, heads.text_head
    image_hidden = hidden(rows["image_rows"], heads.image_mlp)
    image = reference.masked_pixel_loss(
        image_hidden, image_head.weight, images, patch_ids, bias=image_head.bias, row_weight=image_weight,
        norm_pix=True, reduction="sum", **pixels,
    )  # fmt: skip
    text = right = torch.zeros(())
    pixels_predicted, logits = heads.predict(x, **rows)
    assert torch.allclose(pixels_predicted, image_head.predict(image_hidden), atol=1e-5)
    if vocab is None:
        assert logits is None
    else:
        text_hidden = hidden(rows["text_rows"], heads.text_mlp)
        text, correct = reference.masked_token_loss(
            text_hidden, text_head.weight, targets, bias=text_head.bias, row_weight=text_weight, reduction="sum",
            label_smoothing=0.1, z_loss=0.01, return_correct=True,
        )  # fmt: skip
        right = (correct * text_weight).sum()
        assert torch.equal(logits.argmax(1) == targets, correct)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(got, (image, text, right)))
    learned = [x, *heads.parameters()]
    expected = torch.autograd.grad(image + text, learned)
    for ours, theirs in zip(torch.autograd.grad(got.image + got.text, learned), expected):
        assert error(ours, theirs.double()) < 2e-6


@pytest.mark.parametrize(
    "case, changes, error_type, message",
    [
        ("attend-some", {"qkv": torch.zeros(3, 2, 1, 8)}, ValueError, r"qkv has shape \(3, 2, 1, 8\)"),
        (
            "attend-some",
            {"qkv": torch.zeros(43, 3, 1, 160), "impl": "triton"},
            ValueError,
            "the head dimension is 160, but the Tr",
        ),
        ("attend-some", {"max_queries": 3}, ValueError, "q, cu_queries and max_queries must be given together"),
        ("attend-queries", {"cu_queries": torch.zeros(2).int()}, ValueError, "cu_queries has shape"),
        ("gather-some", {"rows": torch.zeros(3)}, TypeError, "rows must be int32 or int64"),
        ("gather-some", {"x": torch.zeros(())}, ValueError, r"x has shape \(\)"),
        ("norm-some", {"norm_weight": None}, ValueError, "norm_bias requires norm_weight"),
        ("scatter-mask", {"fill": None}, ValueError, "fill and fill_ids must be given together"),
        ("scatter-no-fill", {"fill_order": torch.zeros(37).int()}, ValueError, "fill_order needs fill"),
        ("pixel-p16", {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        (
            "hog-p16",
            {"std": (0.5,) * 3},
            ValueError,
            "std is for floating-point images, but the images are torch.uint8",
        ),
        ("hog-float", {"std": (0.5,)}, ValueError, r"std must be a positive, .* each of the 3 channels, got \(0\.5,\)"),
        ("hog-float", {"std": (0.5, 0.0, 1.0)}, ValueError, "std must be a positive, finite number for each"),
        ("hog-p16", {"weight": torch.zeros(8, 123)}, ValueError, r"weight has shape \(8, 123\), expected \[9, 123\]"),
        ("hog-p16", {"patch_size": 7}, ValueError, "cannot be divided into patches of 7 x 7"),
        ("token-some", {"workspace": 0}, ValueError, "workspace is 0 bytes"),
        ("scatter-mask", {"fill": torch.zeros(2, 5)}, ValueError, "fill has shape"),
        ("scatter-mask", {"table_ids": torch.zeros(2).int()}, ValueError, "table_ids has shape"),
        ("embed-p16", {"patch_size": 7}, ValueError, "cannot be divided into patches of 7 x 7"),
        ("embed-p16", {"mean": None}, ValueError, "mean and std"),
        ("embed-p16", {"std": (0.0, 1.0, 1.0)}, ValueError, "std must be positive"),
        ("embed-float", {"mean": (0.5,) * 3}, ValueError, "3 channels, or neither"),
        ("embed-p16", {"images": torch.zeros(1, 0, 16, 16)}, ValueError, "0 channels"),
        ("embed-p16", {"images": torch.zeros(1, 3, 16, 16, dtype=torch.int16)}, TypeError, "uint8, uint16 or floating"),
        ("embed-bands", {"mean": (0.5,) * 3}, ValueError, "uint16 images need mean and std .* their 13 channels$"),
        ("embed-p16", {"weight": torch.zeros(4, 3)}, ValueError, "weight has shape"),
        ("pixel-p16", {"row_weight": torch.ones(2)}, ValueError, "row_weight has shape"),
        ("token-some", {"hidden": torch.zeros(19, 512, dtype=torch.int32)}, TypeError, "hidden must be floating"),
        ("embed-p16", {"bias": torch.zeros(123, device="meta")}, ValueError, "bias is on meta"),
        ("norm-some", {"norm_weight": torch.zeros(123, device="meta")}, ValueError, "norm_weight is on meta"),
        ("token-some", {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ("token-some", {"weight": torch.zeros(0, 512), "bias": torch.zeros(0)}, ValueError, "no rows"),
        ("token-some", {"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ("token-some", {"targets": [1, 2]}, TypeError, "^targets must be a tensor, not list$"),
        ("token-some", {"weight": None}, TypeError, "^weight must be a tensor, not NoneType$"),
        ("embed-p16", {"images": [[0]]}, TypeError, "^images must be a tensor, not list$"),
        ("gather-some", {"x": torch.zeros(2, 3).to_sparse()}, TypeError, "x must be a dense tensor, but its layout"),
        ("gather-some", {"x": torch.zeros(2, 3).to(torch.float8_e5m2)}, TypeError, "x must be floating-point with 16"),
        (
            "embed-p16",
            {"images": torch.zeros(1, 3, 16, 16).to(torch.float8_e5m2)},
            TypeError,
            "floating-point with 16, 32 or",
        ),
        ("embed-p16", {"patch_size": (16, 16)}, TypeError, r"patch_size is \(16, 16\), but must be an integer"),
        ("embed-p16", {"mean": 0.5}, ValueError, "mean and std with one number"),
        ("token-some", {"ignore_index": None}, TypeError, "ignore_index is None, but must be an integer"),
        ("token-some", {"ignore_index": 2**32}, ValueError, "which int32 targets cannot contain"),
        ("attend-some", {"qkv": torch.zeros(43, 3, 2, 0)}, ValueError, "qkv has 2 heads of dimension 0"),
        ("attend-some", {"max_seqlen": 37.5}, TypeError, "max_seqlen is 37.5, but must be an integer"),
        (
            "attend-some",
            {"max_seqlen": torch.ones(2).int()},
            TypeError,
            r"max_seqlen is a tensor of .* shape \(2,\), but",
        ),
        ("norm-some", {"eps": "1e-6"}, TypeError, "eps is '1e-6', but must be a number"),
        ("pixel-float", {"images": torch.zeros(2, 3, 16, 24, device="meta")}, ValueError, "patch_ids is on cpu, but"),
        ("pixel-p16", {"hidden": torch.zeros(37, 123, device="meta")}, ValueError, "hidden is on meta, but the other"),
        ("embed-p16", {"patch_size": 0}, ValueError, "patch_size is 0, but must be at least 1"),
        ("embed-p16", {"mean": ("a", "b", "c")}, ValueError, "mean and std with one number"),
        ("embed-p16", {"mean": (float("nan"),) * 3}, ValueError, "mean must be finite"),
        ("embed-p16", {"std": (float("nan"),) * 3}, ValueError, "std must be positive and finite"),
        ("token-some", {"label_smoothing": None}, TypeError, "label_smoothing is None, but must be a number"),
        ("token-some", {"z_loss": "0.1"}, TypeError, "z_loss is '0.1', but must be a number"),
        ("token-some", {"workspace": "1GB"}, TypeError, "workspace is '1GB', but must be an integer number of bytes"),
    ],
)
def test_invalid_arguments_are_named(case, changes, error_type, message, monkeypatch):
    import_kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # otherwise, impl="triton" would be the mistake
    inputs = make(case, torch.float32)
    function = getattr(m3ae_kernels, CASES[case][0].__name__)
    with pytest.raises(error_type, match=message):
        function(**inputs.tensors | inputs.options | changes)
