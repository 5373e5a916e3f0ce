"""The attention op and the choice of its implementation, compared with float64. Stand-ins replace third-party
kernels."""

import itertools
import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen
from m3ae_kernels.attention import Kernel, Segments, cuda, op, padded, per_sample
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.attention.per_sample import PER_SAMPLE
from torch import Tensor

from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.model.transformer import Block
from m3ae_fast.training.attention_kernels import RunAttention
from tests.helpers.attention import attend
from tests.helpers.triton_kernels import import_kernels

CPU, BF16 = torch.device("cpu"), torch.bfloat16
QUERIES, KEYS = [0, 1, 3, 5, 3, 3], [2, 1, 7, 5, 7, 7]  # some lengths are equal
CONFIG = ModelConfig(
    size=None, emb_dim=64, depth=1, num_heads=2, dec_emb_dim=48, dec_depth=1, dec_num_heads=3,
    image_size=32, patch_size=8, text_length=12, vocab_size=50,
)  # fmt: skip


def segments(lengths: list[int]) -> Segments:
    return Segments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths), sum(lengths))


def inputs(dtype: torch.dtype, whole: bool, dim: int = 8) -> tuple:
    """Return q or None, keys and values, and the segments of the queries and of the keys."""
    torch.manual_seed(0)
    lengths = KEYS if whole else QUERIES
    kv = torch.randn(sum(KEYS), 3 if whole else 2, 2, dim, dtype=dtype).requires_grad_()
    q = None if whole else torch.randn(sum(QUERIES), 2, dim, dtype=dtype).requires_grad_()
    return q, kv, segments(lengths), segments(KEYS)


def softmax_attention(q: Tensor | None, kv: Tensor, queries: Segments, keys: Segments) -> Tensor:
    q, k, v = kv.unbind(1) if q is None else (q, *kv.unbind(1))
    ends = zip(itertools.pairwise(queries.cu_seqlens.tolist()), itertools.pairwise(keys.cu_seqlens.tolist()))
    parts = [
        torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]).div(q.shape[-1] ** 0.5).softmax(-1) @ v[c:d].transpose(0, 1)
        for (a, b), (c, d) in ends
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


def sdpa(q: Tensor | None, kv: Tensor, queries: Segments, keys: Segments) -> Tensor:
    return padded.padded_attention(*(kv.unbind(1) if q is None else (q, *kv.unbind(1))), queries, keys)


def gradients(out: Tensor, q: Tensor | None, kv: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, [x for x in (q, kv) if x is not None], grad)


@pytest.fixture(params=["cpu", "padded matmuls", "scaled_dot_product_attention"])
def run(request, monkeypatch):
    if request.param == "padded matmuls":
        monkeypatch.setattr(op, "kernel_for", lambda *_: PADDED)
    return sdpa if request.param.startswith("scaled") else attend


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_attention_against_softmax(run, dtype, tolerance, whole):
    """Compare outputs and gradients for lengths of 0, 1 and more, and with fewer queries than keys."""
    q, kv, *ends = inputs(dtype, whole)
    out = run(q, kv, *ends)
    q64, kv64 = (x if x is None else x.detach().double().requires_grad_() for x in (q, kv))
    exact = softmax_attention(q64, kv64, *ends)
    pairs = zip((out, *gradients(out, q, kv)), (exact, *gradients(exact, q64, kv64)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_attention_op_passes_opcheck_and_gradcheck(whole):
    for dtype in (torch.float64, torch.float32):
        q, kv, queries, keys = inputs(dtype, whole, dim=16)
        arguments = (q, kv, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
        torch.library.opcheck(op.attention_op.registered, (*arguments, "auto"))
    q, kv, *ends = inputs(torch.float64, whole)
    torch.autograd.gradcheck(
        lambda *x: attend(*x, *ends) if q is not None else attend(None, *x, *ends),
        (kv,) if whole else (q, kv),
    )


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True])
def test_a_block_is_one_graph(pruned):
    torch.manual_seed(0)
    block = Block(32, 2, 4, "tanh")
    x = torch.randn(sum(KEYS), 32)
    rows = (
        torch.tensor([2, 3, 4, 9, 10, 11, 12, 13, 14, *range(15, 18), *range(22, 25)], dtype=torch.int32),
        segments(QUERIES),
    )
    arguments = (x, segments(KEYS), *(rows if pruned else ()))
    expected, got = (
        block(*arguments),
        torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")(*arguments),
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.sum(), list(block.parameters())) for out in (expected, got)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


def test_the_gradient_of_keys_and_values_is_one_contiguous_tensor():
    """The gradient goes to the preceding matmul without concatenation or copy."""
    _, kv, *ends = inputs(torch.float32, True)
    seen = []
    x = kv.detach().flatten(1).requires_grad_()
    x.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    out = attend(None, (x * 1).unflatten(1, kv.shape[1:]), *ends)
    names = set()
    node = out.grad_fn
    while node is not None:
        names.add(type(node).__name__)
        node = next((n for n, _ in node.next_functions if n is not None), None)
    out.sum().backward()
    assert seen == [True]
    assert not [n for n in names if any(word in n for word in ("Cat", "Stack", "Clone", "Select", "Slice"))], names


def test_attention_accepts_no_queries_and_no_rows():
    for q_lengths, k_lengths in (([0, 0], [2, 3]), ([0], [0])):
        kv = torch.randn(sum(k_lengths), 2, 2, 8).requires_grad_()
        q = torch.empty(0, 2, 8).requires_grad_()
        out = attend(q, kv, segments(q_lengths), segments(k_lengths))
        out.sum().backward()
        assert out.shape == (0, 2, 8) and q.grad.shape == q.shape and not kv.grad.any()


def test_scores_that_are_computed_together_fit_into_the_cache(monkeypatch):
    """Samples of equal lengths are computed together, as many as fit into the cache. A sample that does not fit is
    computed alone."""
    monkeypatch.setattr(per_sample, "CHUNK_SCORES", 600)
    for queries, keys, sizes in ((5, 7, [8, 2]), (7, 5, [8, 2]), (20, 20, [1] * 10)):
        groups = per_sample._groups(segments([queries] * 10), segments([keys] * 10), 2)
        assert [len(group.q_starts) for group in groups] == sizes


# ---- stand-ins for the kernels of other libraries: they take the same arguments, and compute the results with torch
# ----


def fill(grads: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for grad, value in zip(grads, right):
        grad.copy_(value)


class StandIns:
    """Stand-ins for the modules of other libraries, and a record of their calls. The library named by `wrong` returns
    wrong results."""

    def __init__(self, wrong: str = "") -> None:
        self.calls: list[str] = []
        self.deterministic: list[bool] = []  # the argument `deterministic` of each backward pass of flash-attn
        self.wrong = wrong

    def forward(self, name: str, q, k, v, ends: tuple) -> tuple[Tensor, Tensor]:
        self.calls.append(f"{name} forward")
        assert q.dim() == 3 and ends[0].dtype == torch.int32 and isinstance(ends[2], int)
        queries, keys = Segments(ends[0], ends[2], len(q)), Segments(ends[1], ends[3], len(k))
        out, lse = PADDED.forward(q, k, v, queries, keys)
        return (out + 1 if name == self.wrong else out), lse

    def backward(self, name: str, grad, q, k, v, out, lse, ends: tuple) -> tuple[Tensor, ...]:
        self.calls.append(f"{name} backward")
        queries, keys = Segments(ends[0], ends[2], len(q)), Segments(ends[1], ends[3], len(k))
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        PADDED.backward(grad, q, k, v, out, lse, *grads, queries, keys)
        return grads

    def flash_attn_2(self) -> dict[str, ModuleType]:
        module = ModuleType("flash_attn.flash_attn_interface")

        def _flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        ):  # fmt: skip
            assert dropout_p == 0 and softmax_scale == q.shape[-1] ** -0.5 and not causal
            ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return *self.forward("2", q, k, v, ends), None, None

        def _flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
            deterministic, rng_state=None,
        ):  # fmt: skip
            assert dropout_p == 0 and softmax_scale == q.shape[-1] ** -0.5 and not causal and not softcap
            self.deterministic.append(deterministic)
            ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            fill((dq, dk, dv), self.backward("2", dout, q, k, v, out, softmax_lse, ends))

        module._flash_attn_varlen_forward = _flash_attn_varlen_forward
        module._flash_attn_varlen_backward = _flash_attn_varlen_backward
        return {"flash_attn": ModuleType("flash_attn"), "flash_attn.flash_attn_interface": module}

    def flash_attn_3(self) -> dict[str, ModuleType]:
        module = ModuleType("flash_attn_interface")

        def _flash_attn_forward(
            q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
            max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False,
        ):  # fmt: skip
            assert softmax_scale == q.shape[-1] ** -0.5
            return *self.forward("3", q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)), None, None

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
            max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
            deterministic=False,
        ):  # fmt: skip
            assert softmax_scale == q.shape[-1] ** -0.5
            self.deterministic.append(deterministic)
            ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            fill((dq, dk, dv), self.backward("3", dout, q, k, v, out, softmax_lse, ends))

        module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
        return {"flash_attn_interface": module}

    def flash_attn_3_as_a_package(self) -> dict[str, ModuleType]:
        package = ModuleType("flash_attn_3")
        package.flash_attn_interface = self.flash_attn_3()["flash_attn_interface"]
        return {"flash_attn_3": package}

    def flash_attn_4(self) -> dict[str, ModuleType]:
        module = ModuleType("flash_attn.cute.interface")

        def _flash_attn_fwd(
            q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
            max_seqlen_k=None, softmax_scale=None, causal=False, return_lse=False,
        ):  # fmt: skip
            assert return_lse
            return self.forward("4", q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))

        def _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
            max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, deterministic=False,
        ):  # fmt: skip
            self.deterministic.append(deterministic)
            ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            fill((dq, dk, dv), self.backward("4", dout, q, k, v, out, lse, ends))

        module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
        names = ("flash_attn", "flash_attn.cute", module.__name__)
        return dict(zip(names, (ModuleType("flash_attn"), ModuleType("flash_attn.cute"), module)))

    def install(self, monkeypatch, *names: str) -> None:
        for name in names:
            for path, module in getattr(self, name)().items():
                monkeypatch.setitem(sys.modules, path, module)

    def install_in_torch(self, monkeypatch) -> None:
        def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask):
            assert dropout_p == 0 and not is_causal and not return_debug_mask
            return *self.forward("torch", q, k, v, (cu_q, cu_k, max_q, max_k)), None, None, None

        def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, state, unused):
            assert dropout_p == 0 and not is_causal and state.shape == (2,) and unused.numel() == 0
            return self.backward("torch", grad, q, k, v, out, lse, (cu_q, cu_k, max_q, max_k))

        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)

    def install_cudnn(self, monkeypatch) -> None:
        """Install the stand-in for cuDNN under the names of torch 2.14."""

        def forward(
            *, query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp, dropout_p=0.0,
            is_causal=False, return_debug_mask=False, scale=None, seqused_k=None, block_table=None,
        ):  # fmt: skip
            assert compute_log_sumexp and attn_bias is None and min(max_q, max_k) > 128
            ends = (cum_seq_q, cum_seq_k, max_q, max_k)
            return *self.forward("cuDNN", query, key, value, ends), cum_seq_q, cum_seq_k, max_q, max_k, None, None, None

        def backward(
            *, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
            max_q, max_k, dropout_p, is_causal, scale=None,
        ):  # fmt: skip
            assert attn_bias is None and dropout_p == 0 and not is_causal and min(max_q, max_k) > 128
            assert philox_seed.shape == philox_offset.shape == (2,)
            ends = (cum_seq_q, cum_seq_k, max_q, max_k)
            return self.backward("cuDNN", grad_out, query, key, value, out, logsumexp, ends)

        monkeypatch.setattr(torch.nn.attention.varlen, "_should_use_cudnn", lambda device: True)
        monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", forward)
        monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_backward", backward)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget the chosen implementations, and replace the functions that wait for a device."""
    monkeypatch.setattr(cuda, "_chosen", {})
    monkeypatch.setattr(cuda, "SAMPLES", 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


@pytest.mark.parametrize("name", [name for name in cuda.MAKERS if name != "triton"])
@pytest.mark.parametrize("whole", [True, False])
def test_third_party_attention_kernels_are_called_with_correct_arguments(monkeypatch, name, whole):
    stand_ins = StandIns()
    stand_ins.install(monkeypatch, "flash_attn_2", "flash_attn_3")
    if name == "flash-attn 4":
        stand_ins.install(monkeypatch, "flash_attn_4")
    stand_ins.install_in_torch(monkeypatch)
    stand_ins.install_cudnn(monkeypatch)
    kernel = cuda.MAKERS[name](CPU)
    assert kernel.name == name
    monkeypatch.setattr(op, "kernel_for", lambda *_: kernel)
    q, kv, *ends = inputs(torch.float32, whole)
    out = attend(q, kv, *ends)
    got = (out, *gradients(out, q, kv))
    short = name.removeprefix("flash-attn ").removesuffix(" varlen")
    assert stand_ins.calls == [f"{short} forward", f"{short} backward"]
    exact = softmax_attention(q, kv, *ends)
    for ours, theirs in zip(got, (exact, *gradients(exact, q, kv))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_the_fastest_attention_kernel_is_chosen_and_the_reasons_against_the_others_are_logged(monkeypatch, caplog):
    """The test sets the times of the kernels."""
    stand_ins = StandIns(wrong="3")
    stand_ins.install(monkeypatch, "flash_attn_2", "flash_attn_3")
    stand_ins.install_in_torch(monkeypatch)
    seconds = {"flash-attn 2": 1.0, "torch varlen": 2.0}
    monkeypatch.setattr(cuda, "_seconds", lambda kernel, *_: seconds[kernel.name])
    with caplog.at_level(logging.INFO):
        assert cuda.choose(CPU, BF16, 2, 16, 9).name == "flash-attn 2"
    assert "flash-attn 4 is not available (No module named 'flash_attn.cute'" in caplog.text
    assert "cuDNN is not available (packed samples require torch 2.14" in caplog.text
    assert "triton is not available (the Triton kernels do not support this GPU)" in caplog.text
    assert not [line for line in caplog.records if line.levelno > logging.INFO and "not available" in line.message]
    assert "flash-attn 3 is excluded: its results are off by" in caplog.text
    assert "torch varlen takes 2000.000 ms" in caplog.text
    # a repeated request runs no new trials, but another length at the start of a run does
    stand_ins.calls.clear()
    assert cuda.choose(CPU, BF16, 2, 16, 300).name == "flash-attn 2" and not stand_ins.calls
    seconds["torch varlen"] = 0.5
    assert cuda.choose_by_benchmark(CPU, BF16, 2, 16, 300).name == "torch varlen"
    assert cuda.choose_by_benchmark(CPU, BF16, 2, 16, 300).name == "torch varlen"
    # lengths are compared by their ratio: 52 is about as far from 9 as from 300, because 9 * 300 is about 52 * 52
    asked = (12, 50, 54, 150, 290)
    assert [cuda.choose(CPU, BF16, 2, 16, n).name for n in asked] == ["flash-attn 2"] * 2 + ["torch varlen"] * 3


@pytest.mark.parametrize("module", ["flash_attn_2", "flash_attn_3", "flash_attn_3_as_a_package", "flash_attn_4"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attn_is_deterministic_if_torch_is(monkeypatch, module, deterministic):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    stand_ins = StandIns()
    stand_ins.install(monkeypatch, module)
    kernel = cuda.MAKERS[f"flash-attn {module[11]}"](CPU)
    cuda.results(kernel, *cuda.example(CPU, BF16, 2, 16, 9))
    assert stand_ins.deterministic == [deterministic]


def test_kernels_that_fail_are_excluded(monkeypatch, caplog):
    """One kernel cannot be loaded, and the other one does not support this GPU. Padded attention is used instead. It is
    also used for float32, for which no other kernel is tried."""

    def broken(device) -> Kernel:
        raise ImportError("libcudart.so.11: cannot open shared object file")

    def elsewhere(*_) -> None:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    makers = {"old": broken, "new": lambda device: Kernel("new", elsewhere, elsewhere)}
    monkeypatch.setattr(cuda, "MAKERS", makers)
    assert cuda.choose(CPU, BF16, 2, 16, 9) is PADDED
    assert "old is excluded: libcudart.so.11" in caplog.text and "new is excluded: FlashAttention only" in caplog.text
    monkeypatch.setattr(cuda, "MAKERS", {"any": lambda device: pytest.fail("float32 has no kernel of others")})
    assert cuda.choose(CPU, torch.float32, 2, 16, 9) is PADDED
    tried = Kernel("tried", elsewhere, elsewhere)
    monkeypatch.setattr(cuda, "MAKERS", {"tried": lambda device: tried})
    monkeypatch.setattr(cuda, "fastest", lambda *_: {"tried": 1.0})
    assert [cuda.choose(CPU, dtype, 2, 24, 9) for dtype in (BF16, torch.float16)] == [tried] * 2


def test_kernels_with_wrong_results_are_excluded(monkeypatch, caplog):
    """The wrong kernels return NaN, errors of a few percent or wrong gradients, or assume that all samples have the
    same length."""

    def times(factor: float):
        def forward(*arguments):
            out, lse = PADDED.forward(*arguments)
            return out * factor, lse

        return Kernel("wrong", forward, PADDED.backward)

    def alike(q, k, v, queries, keys):
        ends = (torch.arange(len(keys.cu_seqlens)) * keys.max_seqlen).clamp(max=keys.rows).int()
        even = Segments(ends, keys.max_seqlen, keys.rows)
        return PADDED.forward(q, k, v, even if queries is keys else queries, even)

    def swapped(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        PADDED.backward(grad, q, k, v, out, lse, dq, dv, dk, queries, keys)

    wrong = {"nan": times(torch.nan), "near": times(1.05), "alike": Kernel("wrong", alike, PADDED.backward)}
    wrong["swapped"] = Kernel("wrong", PADDED.forward, swapped)
    monkeypatch.setattr(cuda, "SAMPLES", 3)
    makers = {name: lambda _, kernel=kernel: kernel for name, kernel in wrong.items()}
    inputs = cuda.example(CPU, BF16, 2, 16, 9)
    assert cuda.fastest(makers, CPU, inputs, inputs) == {}
    assert all(f"attention: {name} is excluded: its results are off by" in caplog.text for name in makers)
    right = times(1.0)
    assert list(cuda.fastest(makers | {"right": lambda _: right}, CPU, inputs, inputs)) == ["right"]


def test_kernels_that_are_wrong_for_fewer_queries_than_keys_are_excluded(monkeypatch, caplog):
    """In the last block of an encoder, there are fewer queries than keys. A kernel is also excluded if its log-sum-exps
    have another shape, because compiled code would then fail."""

    def near(q, k, v, queries, keys):
        out, lse = PADDED.forward(q, k, v, queries, keys)
        return (out if queries is keys else out * 1.05), lse

    def other_sums(*arguments):
        out, lse = PADDED.forward(*arguments)
        return out, lse.t()[..., None]

    makers = {"one": lambda _: Kernel("one", near, PADDED.backward)}
    makers["two"] = lambda _: Kernel("two", other_sums, PADDED.backward)
    inputs = cuda.example(CPU, BF16, 2, 16, 9)
    assert cuda.fastest(makers, CPU, inputs, inputs) == {}
    assert "one is excluded: its results are off by" in caplog.text
    assert "two is excluded: its log-sum-exps have shape (17, 2, 1)" in caplog.text


@pytest.mark.parametrize(
    ("ends", "longest"), [([0, 5, 3, 9], 5), ([0, 4, 9], 4), ([1, 5, 9], 5), ([0, 4, 8], 5), ([0, 4, 10], 6), ([], 9)]
)
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_invalid_sample_boundaries_are_refused(ends, longest, impl):
    """The boundaries of queries and of keys are rejected if they decrease, are further apart than the longest length,
    or leave out rows."""
    kv, right = torch.randn(9, 3, 2, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    wrong = torch.tensor(ends, dtype=torch.int32)
    op.packed_attention(kv, right, 5, impl=impl)
    with pytest.raises(IndexError, match="cu_seqlens must increase from 0 to 9, the number of rows"):
        op.packed_attention(kv, wrong, longest, impl=impl)
    if len(ends) == 3:
        queries = {"q": kv[:, 0], "cu_queries": wrong, "max_queries": longest}
        with pytest.raises(IndexError, match="cu_queries must increase from 0 to 9, the number of rows"):
            op.packed_attention(kv[:, 1:], right, 5, impl=impl, **queries)


def test_the_requested_implementation_is_used(monkeypatch):
    """Both devices use the requested implementation, and the run logs the choice. The Triton kernels are tested in
    tests/kernels."""
    monkeypatch.setattr(cuda, "choose", lambda *_: pytest.fail("nothing is tried"))
    monkeypatch.setattr(cuda, "choose_by_benchmark", cuda.choose)
    import_kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # otherwise the CPU would refuse Triton
    for device, torch_kernel in ((CPU, PER_SAMPLE), (torch.device("cuda"), PADDED)):
        for impl, name in (("torch", torch_kernel.name), ("triton", "triton")):
            assert kernel_for(impl, device, BF16, 2, 16, 9).name == name
            monkeypatch.setenv("M3AE_KERNELS_IMPL", impl)
            assert RunAttention(CONFIG, MaskingConfig(), device, BF16).describe() == name


@pytest.mark.slow
def test_attention_kernels_are_ranked_by_measured_time(monkeypatch):
    slow = Kernel("slow", lambda *x: [PADDED.forward(*x) for _ in range(40)][-1], PADDED.backward)
    fast = Kernel("fast", PADDED.forward, PADDED.backward)
    for order in ((slow, fast), (fast, slow)):
        makers = {kernel.name: lambda _, kernel=kernel: kernel for kernel in order}
        inputs = cuda.example(CPU, BF16, 2, 16, 9)
        times = cuda.fastest(makers, CPU, inputs, inputs)
        assert list(times) == ["fast", "slow"] and 0 < times["fast"] < times["slow"]


def test_kernels_are_checked_with_few_samples_and_timed_with_those_of_a_micro_batch(monkeypatch):
    rows = []

    def forward(q, *others):
        rows.append(len(q))
        return PADDED.forward(q, *others)

    monkeypatch.setattr(cuda, "MAKERS", {"one": lambda _: Kernel("one", forward, PADDED.backward)})
    monkeypatch.setattr(cuda, "SAMPLES", 2)
    times = cuda.trial(CPU, BF16, 2, 16, 9, samples=5)
    small, large = sum(9 - i for i in range(2)), sum(9 - i for i in range(5))
    assert list(times) == ["one"] and rows == [small, 5, *[large] * (1 + cuda.ROUNDS**2)]
    assert cuda.trial(CPU, torch.float32, 2, 16, 9, samples=5) == {}


@pytest.fixture
def trials(monkeypatch):
    """Return a record of simulated trials, in which "new" is the fastest kernel and "old" the second."""
    tried = []

    def trial(device, dtype, heads, head_dim, length, samples):
        tried.append((heads, head_dim, length, samples))
        return {"new": 1.0, "old": 2.0}

    makers = {name: lambda _, name=name: Kernel(name, PADDED.forward, PADDED.backward) for name in ("new", "old")}
    monkeypatch.setattr(cuda, "MAKERS", makers)
    monkeypatch.setattr(cuda, "trial", trial)
    monkeypatch.setattr(cuda, "_chosen", {})
    monkeypatch.delenv("M3AE_KERNELS_IMPL", raising=False)
    return tried


def test_one_rank_chooses_the_attention_kernel_for_all_ranks(trials):
    gpu = torch.device("cuda", 0)
    where = (CONFIG, MaskingConfig(), gpu, BF16)
    names, times = RunAttention(*where).choose(512)
    assert names == {"encoder": "new", "decoder": "new"} and times["encoder"] == {"new": 1.0, "old": 2.0}
    assert trials == [(2, 32, 8, 512), (3, 16, 29, 512)]
    RunAttention(*where).use_kernels({"encoder": "new", "decoder": "old"})  # the choice of another rank
    assert RunAttention(*where).describe() == "new (encoder), old (decoder)"
    assert [kernel_for("auto", gpu, BF16, *head, 8).name for head in ((2, 32), (3, 16))] == ["new", "old"]
    assert len(trials) == 2


def test_kernels_are_tried_with_the_length_of_a_whole_sample(trials):
    """Encoder and decoder are tested, with different mask ratios of images and texts."""
    masking = MaskingConfig(image_ratio=0.25, text_ratio=0.5)
    sample = Sample("pair", torch.zeros(3, 32, 32, dtype=torch.uint8), draw_mask(16, 0.25), torch.arange(12))
    sample.text_mask = draw_mask(12, 0.5)
    batch = pack([sample], Geometry.of(CONFIG))
    RunAttention(CONFIG, masking, torch.device("cuda", 0), BF16).choose(512)
    assert [length for _, _, length, _ in trials] == [batch.encoder.max_seqlen, batch.decoder.max_seqlen]


def test_the_attention_kernel_is_chosen_separately_for_each_device_dtype_and_head_shape(trials, monkeypatch):
    real = trials.append
    monkeypatch.setattr(cuda, "trial", lambda *asked, **_: real(asked) or {"new": 1.0})
    gpu, second = (torch.device("cuda", number) for number in (0, 1))
    kind = (gpu, BF16, 2, 32)
    cuda.use_kernel(*kind, 8, "old")
    others = [(second, *kind[1:]), (gpu, torch.float16, 2, 32), (gpu, BF16, 4, 32), (gpu, BF16, 2, 64)]
    assert [cuda.choose(*other, 8).name for other in (kind, *others)] == ["old", *["new"] * 4]
    assert [asked[:4] for asked in trials] == others


def test_a_resumed_run_keeps_its_attention_kernels_if_they_are_available(trials):
    where = (CONFIG, MaskingConfig(), torch.device("cuda", 0), BF16)
    known = {"encoder": "old", "decoder": "of another machine"}
    names, times = RunAttention(*where).choose(512, known)
    assert names == {"encoder": "old", "decoder": "new"} and list(times) == ["decoder"] and len(trials) == 1


def test_attention_kernels_are_not_benchmarked_if_there_is_no_choice(trials, monkeypatch):
    gpu = torch.device("cuda", 0)
    assert RunAttention(CONFIG, MaskingConfig(), CPU, BF16).choose(512) == ({}, {})
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "torch")
    assert RunAttention(CONFIG, MaskingConfig(), gpu, BF16).choose(512) == ({}, {}) and not trials


def test_a_run_reports_its_attention_kernels(monkeypatch):
    """The kernels of encoder and decoder are chosen for their own lengths before the first step."""
    asked = []

    def choose_by_benchmark(device, dtype, heads, head_dim, length):
        asked.append((heads, head_dim, length))
        return Kernel("wide" if head_dim > 16 else "narrow", PADDED.forward, PADDED.backward)

    monkeypatch.setattr(cuda, "choose_by_benchmark", choose_by_benchmark)
    text = RunAttention(CONFIG, MaskingConfig(), torch.device("cuda"), BF16).describe()
    assert text == "wide (encoder), narrow (decoder)" and asked == [(2, 32, 1 + 4 + 3), (3, 16, 1 + 16 + 12)]
    assert RunAttention(CONFIG, MaskingConfig(), CPU, torch.float64).describe() == "torch, per sample"


def test_each_type_of_device_has_its_own_attention_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "choose", lambda *question: question)
    gpu = torch.device("cuda", 0)
    assert kernel_for("auto", gpu, BF16, 2, 16, 9) == (gpu, BF16, 2, 16, 9)
    assert isinstance(kernel_for("auto", CPU, BF16, 2, 16, 9), Kernel)
