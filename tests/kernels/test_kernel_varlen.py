"""`flash_attn_varlen_func`, compared with float64, and the behaviour that users of flash-attn expect. Runs on both
implementations, as test_kernel_ops.py does."""

import inspect
import os
import re

import m3ae_kernels
import pytest
import torch
import torch._dynamo
from m3ae_kernels import reference
from m3ae_kernels.attention import varlen
from m3ae_kernels.attention.choice import own_kernel
from torch import Tensor

from tests.kernels.test_kernel_ops import FLOOR, LOW, error, poisoned  # noqa: F401

TRITON = os.environ.get("M3AE_KERNELS_IMPL") == "triton"
SAME, FEWER, MORE = ((5, 37, 1), (5, 37, 1)), ((3, 20, 0), (5, 37, 4)), ((9, 40, 2), (5, 21, 2))
CASES = {  # lengths of queries, lengths of keys, (heads, heads of keys), options
    "plain": (SAME, (2, 2), {}),
    "scale": (FEWER, (2, 2), {"softmax_scale": 0.07}),
    "causal": (SAME, (2, 2), {"causal": True}),
    "causal, fewer queries": (FEWER, (1, 1), {"causal": True}),
    "causal, more queries": (MORE, (1, 1), {"causal": True}),
    "window": (SAME, (2, 2), {"window_size": (3, 2)}),
    "window of the past": (FEWER, (1, 1), {"window_size": (7, -1)}),
    "window, causal": (MORE, (1, 1), {"window_size": (4, 4), "causal": True, "softmax_scale": 1.5}),
    "grouped": (FEWER, (4, 2), {}),
    "grouped, causal": (SAME, (6, 2), {"causal": True}),
    "no queries": (((0, 0), (3, 2)), (1, 1), {"causal": True}),
    "no keys": (((4, 3, 0), (0, 5, 0)), (2, 2), {}),
    "no keys, causal": (((4, 3), (0, 5)), (2, 1), {"causal": True}),
    "no keys at all": (((4, 3), (0, 0)), (1, 1), {}),
}


def ends(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(
    case: str, dtype: torch.dtype, dim: int = 16, ids: torch.dtype = torch.int32
) -> tuple[list[Tensor], tuple, dict]:
    """Return [q, k, v], the lengths as arguments, and the options."""
    (queries, keys), (heads, groups), options = CASES[case]
    torch.manual_seed(0)
    shapes = (sum(queries), heads, dim), (sum(keys), groups, dim), (sum(keys), groups, dim)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return tensors, (ends(queries, ids), ends(keys, ids), max(queries), max(keys)), options


def run(module, tensors: list[Tensor], lengths: tuple, options: dict) -> dict[str, Tensor]:
    """Return the result, its log-sum-exps and the gradients."""
    extra = {"return_attn_probs": True} if module is m3ae_kernels else {}
    out, lse, *_ = module.flash_attn_varlen_func(*tensors, *lengths, **options, **extra)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, tensors, upstream.to(out.dtype))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip("qkv", grads))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_torch(case, dtype, poisoned):  # noqa: F811
    tensors, lengths, options = make(case, dtype)
    true = run(reference, [t.detach().double().requires_grad_() for t in tensors], lengths, options)
    torch_like = run(reference, tensors, lengths, options)
    got = run(m3ae_kernels, tensors, lengths, options)
    unseen = true["lse"].isinf()
    assert torch.equal(got["lse"].isinf(), unseen) and got["lse"].dtype == torch.float32
    assert (got["out"][unseen.any(0)] == 0).all() and (not ("more" in case or "no keys" in case) or unseen.any())
    for result in (true, torch_like, got):
        result["lse"] = result["lse"].masked_fill(unseen, 0)
    for name, value in got.items():
        assert value.dtype == (dtype if name != "lse" else torch.float32)
        allowed = 2 * error(torch_like[name], true[name]) + FLOOR[value.dtype]
        assert error(value, true[name]) <= allowed, name


def test_wide_heads_and_64_bit_ids_are_supported():
    tensors, lengths, options = make("causal, fewer queries", torch.float32, dim=80, ids=torch.int64)
    true = run(reference, [t.detach().double().requires_grad_() for t in tensors], lengths, options)
    for name, got in run(m3ae_kernels, tensors, lengths, options).items():
        assert error(got, true[name]) < 2e-6, name


@pytest.mark.parametrize("case", ["causal", "plain"])
def test_samples_of_several_tiles_equal_the_reference(case):
    """The samples have more queries and keys than the tile of any kernel."""
    torch.manual_seed(0)
    lengths, options = (70, 131), CASES[case][2]
    tensors = [torch.randn(201, 1, 16, requires_grad=True) for _ in range(3)]
    arguments = ends(lengths), ends(lengths), 131, 131
    true = run(reference, [t.detach().double().requires_grad_() for t in tensors], arguments, options)
    for name, got in run(m3ae_kernels, tensors, arguments, options).items():
        assert error(got, true[name]) < 2e-6, name


@pytest.mark.parametrize("case", ["plain", "causal, fewer queries"])
def test_strided_inputs_equal_contiguous_ones(case):
    """The tensors are the output of one linear layer for all three, or of a separate layer for each."""
    tensors, lengths, options = make(case, torch.float32)
    expected = run(m3ae_kernels, tensors, lengths, options)
    padded = [torch.nn.functional.pad(t.detach(), (0, 0, 1, 2))[:, 1:-2] for t in tensors]
    transposed = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    mixed = [padded[0], tensors[1].detach(), padded[2]]
    for strided in (padded, transposed, mixed):
        results = run(m3ae_kernels, [t.requires_grad_() for t in strided], lengths, options)
        for name, got in results.items():
            assert error(got, expected[name].double()) < 1e-6, name


def test_lengths_may_be_tensors_and_windows_may_exceed_every_sample():
    """Callers compute lengths as tensors, and use a large number to denote "all"."""
    tensors, (*boundaries, longest_q, longest_k), _ = make("plain", torch.float32)
    expected = m3ae_kernels.flash_attn_varlen_func(*tensors, *boundaries, longest_q, longest_k, causal=True)
    lengths = [torch.tensor(longest) for longest in (longest_q, longest_k)]
    for left in (37, 2**31 - 1, 2**40):
        found = m3ae_kernels.flash_attn_varlen_func(*tensors, *boundaries, *lengths, window_size=(left, 0))
        assert torch.equal(found, expected)


def test_dropout_of_queries_without_keys_is_finite():
    tensors, lengths, options = make("no keys, causal", torch.float32)
    out = m3ae_kernels.flash_attn_varlen_func(*tensors, *lengths, 0.5, **options)
    assert (out[:4] == 0).all() and all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


def test_flash_attn_varlen_func_equals_packed_attention():
    tensors, lengths, _ = make("plain", torch.float32)
    q, k, v = tensors
    out = m3ae_kernels.flash_attn_varlen_func(q, k, v, *lengths)
    assert torch.equal(out, m3ae_kernels.packed_attention(torch.stack((q, k, v), 1), lengths[0], lengths[2]))


@pytest.mark.parametrize("case", ["causal, more queries", "window", *([] if TRITON else ["grouped", "scale"])])
def test_gradcheck(case):
    (queries, keys), (heads, groups), options = CASES[case]
    torch.manual_seed(0)
    queries, keys = (tuple(min(n, 3) for n in lengths) for lengths in (queries, keys))
    queries = (4, *queries[1:]) if "more" in case else queries
    tensors = [torch.randn(sum(n), h, 2, dtype=torch.float64).requires_grad_()
               for n, h in ((queries, heads), (keys, groups), (keys, groups))]  # fmt: skip
    lengths = ends(queries), ends(keys), max(queries), max(keys)

    def function(*tensors: Tensor) -> Tensor:
        return m3ae_kernels.flash_attn_varlen_func(*tensors, *lengths, **options)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=TRITON)


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_two_runs_are_bitwise_equal_and_frozen_inputs_get_no_gradient(case):
    tensors, lengths, options = make(case, torch.float32)
    first, second = (run(m3ae_kernels, tensors, lengths, options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    q, k, v = tensors
    out = m3ae_kernels.flash_attn_varlen_func(q.detach(), k, v.detach(), *lengths, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(out, k, upstream.to(out.dtype))[0], first["k"])


def test_compile_equals_eager():
    tensors, lengths, options = make("grouped, causal", torch.float32)

    def function(*tensors: Tensor) -> Tensor:
        return m3ae_kernels.flash_attn_varlen_func(*tensors, *lengths, **options)

    torch._dynamo.reset()
    eager, compiled = function(*tensors), torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(eager, compiled)
    for a, b in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (eager, compiled))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_opcheck(case):
    (q, k, v), lengths, options = make(case, torch.float32)
    right = 0 if options else -1
    arguments = (q, k, v, *lengths, 0.25, -1, right, False, "auto")
    tests = ["test_schema", "test_faketensor"] if TRITON else list(torch.library.opcheck.__kwdefaults__["test_utils"])
    torch.library.opcheck(varlen.varlen_attention_op.registered, arguments, test_utils=tests)


def test_attention_dropout_is_applied():
    tensors, lengths, options = make("causal", torch.float32)
    whole = m3ae_kernels.flash_attn_varlen_func(*tensors, *lengths, **options)
    torch.manual_seed(0)
    mean = sum(m3ae_kernels.flash_attn_varlen_func(*tensors, *lengths, 0.2, **options) for _ in range(200)) / 200
    assert 0 < error(mean, whole.double()) < 0.1


def test_arguments_equal_those_of_flash_attn():
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    options = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
    names = ["q", "k", "v", *lengths, *options, "return_attn_probs", "block_table"]  # flash-attn 2.8
    parameters = inspect.signature(m3ae_kernels.flash_attn_varlen_func).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == names
    assert [p.default for p in parameters][7:16] == [0.0, None, False, (-1, -1), 0.0, None, False, False, None]


@pytest.mark.parametrize(
    "changes, error_type, message",
    [
        ({"softcap": 30.0}, NotImplementedError, "does not support softcap; flash-attn itself does, on a GPU"),
        ({"alibi_slopes": torch.ones(2)}, NotImplementedError, "does not support alibi_slopes"),
        ({"block_table": torch.ones(2, 2).int()}, NotImplementedError, "does not support block_table"),
        ({"dropout_p": 0.1, "return_attn_probs": True}, NotImplementedError, "return_attn_probs with dropout_p"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0, but must be positive"),
        (
            {"k": torch.randn(43, 3, 16), "v": torch.randn(43, 3, 16)},
            ValueError,
            "q has 2 heads, which is not a multiple",
        ),
        ({"v": torch.randn(43, 2, 8)}, ValueError, r"v has shape \(43, 2, 8\), expected \[43, 2, 16\]"),
        ({"k": torch.randn(43, 2, 8)}, ValueError, r"k has shape"),
        ({"cu_seqlens_k": torch.zeros(2).int()}, ValueError, "cu_seqlens_k has shape"),
        ({"cu_seqlens_q": torch.zeros(4)}, TypeError, "cu_seqlens_q must be int32 or int64"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 42, 44]).int()}, IndexError, "flash_attn_varlen_func: cu_seqlens_k must"),
        ({"max_seqlen_q": 36}, IndexError, r"cu_seqlens_q must .* at most 36, .*: cu_seqlens_q\[2\] is 42"),
        ({"max_seqlen_k": 3, "dropout_p": 0.1}, IndexError, "flash_attn_varlen_func: cu_seqlens_k must"),
        ({"max_seqlen_k": 37.0}, TypeError, "max_seqlen_k is 37.0, but must be an integer"),
        ({"window_size": 3}, TypeError, r"window_size is 3, but must be a pair of integers, \(left, right\)"),
        ({"window_size": (3, None)}, TypeError, r"window_size is \(3, None\), but must be a pair"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, but must be at least 0 and below 1"),
        ({name: torch.randn(43, 2, 0) for name in "qkv"}, ValueError, "q has 2 heads of dimension 0"),
    ],
)
def test_invalid_arguments_are_named(changes, error_type, message):
    tensors, lengths, options = make("plain", torch.float32)
    names = list(inspect.signature(m3ae_kernels.flash_attn_varlen_func).parameters)
    arguments = dict(zip(names, (*tensors, *lengths))) | options | changes
    with pytest.raises(error_type, match=message):
        m3ae_kernels.flash_attn_varlen_func(**arguments)


def test_the_attention_kernel_depends_on_implementation_device_and_dtype():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert own_kernel("triton", gpu, torch.float16).name == "triton"
    assert own_kernel("torch", gpu, torch.float16).name == "padded matmuls"
    assert own_kernel("triton", gpu, torch.float64).name == "padded matmuls"
    assert own_kernel("torch", cpu, torch.float32).name == "padded matmuls"
    assert re.fullmatch("triton|padded matmuls", own_kernel("auto", cpu, torch.float32).name)
