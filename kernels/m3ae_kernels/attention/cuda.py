"""Attention on CUDA GPUs, with the fastest of the kernels of flash-attn (2, 3 and 4), cuDNN, torch and this package.

No kernel is fastest in all cases. For example, flash-attn 3 pads a head dimension of 32 to 64, and its tiles of 192
keys are only partly filled by a sample of 70 visible tokens. flash-attn 2 has neither disadvantage, but does not use
Hopper's instructions. Therefore, each kernel is benchmarked once on random samples of a given length, forward and
backward. A kernel that is not installed, fails or computes wrong results on this GPU is excluded, and the log states
the reason. The same applies to this package's own Triton kernel.

Shapes: T packed rows, Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tuning
from .kernel import Kernel, Segments
from .padded import PADDED

SAMPLES = 64  # number of samples in a check and, unless another number is given, in a benchmark
HALVES = (torch.bfloat16, torch.float16)
HEAD_START = 20_000_000  # GPU cycles (about 10 ms) that the GPU waits while the host launches kernels
ROUNDS = 3  # number of rounds of a benchmark, and number of calls in each round
# minimum length of the longest sample that is passed to cuDNN; torch itself does not use cuDNN for shorter samples
CUDNN_ROWS = 129
ERROR = 0.03  # maximum `distance` that is allowed between the results of two kernels in 16 bits

Inputs = tuple[Tensor, Tensor, Segments]  # qkv [T, 3, H, D], the gradient of the result [T, H, D], and the samples
Maker = Callable[[torch.device], Kernel]


class NotAvailable(Exception):
    """Raised if a kernel is not available on this GPU or in this version of its library."""


_log = logging.getLogger(__name__)
_chosen: dict[tuple, dict[int, Kernel]] = {}  # (device, dtype, heads, head dimension) -> length -> kernel


def choose(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Return the fastest kernel for samples of about `length` rows. Kernels are benchmarked once per head
    configuration; for a length without a benchmark, the kernel of the nearest length with a benchmark is used (see
    `choose_by_benchmark`)."""
    choices = _chosen.get((device, dtype, heads, head_dim))
    if choices is None:
        return choose_by_benchmark(device, dtype, heads, head_dim, length)
    return choices[min(choices, key=lambda known: abs(math.log(known / length)))]


def choose_by_benchmark(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Return the fastest kernel for samples of about `length` rows. The first call for a length runs the benchmark. If
    no kernel works, or for dtypes other than bfloat16 and float16, the kernel is `PADDED`."""
    if dtype not in HALVES:
        return PADDED
    choices = _chosen.setdefault((device, dtype, heads, head_dim), {})
    if length not in choices:
        times = trial(device, dtype, heads, head_dim, length)
        use_kernel(device, dtype, heads, head_dim, length, next(iter(times), PADDED.name))
    return choices[length]


def trial(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, samples: int = 0
) -> dict[str, float]:
    """Return the time of each working kernel as {kernel name: milliseconds}, fastest first. The kernels are timed on
    `samples` samples (0: `SAMPLES`) of about `length` rows. For dtypes other than bfloat16 and float16, nothing is
    timed, and the dict is empty."""
    if dtype not in HALVES:
        return {}
    inputs = example(device, dtype, heads, head_dim, length)
    timed = example(device, dtype, heads, head_dim, length, samples) if samples else inputs
    return fastest(MAKERS, device, inputs, timed)


def use_kernel(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, name: str) -> None:
    """Use the named kernel for samples of about `length` rows, for example because another process has chosen it.
    Raises KeyError if the name is unknown. If the kernel is not installed, the exception of its factory is raised."""
    kernel = PADDED if name == PADDED.name else MAKERS[name](device)
    _chosen.setdefault((device, dtype, heads, head_dim), {})[length] = kernel


def fastest(makers: dict[str, Maker], device: torch.device, checked: Inputs, timed: Inputs) -> dict[str, float]:
    """Return {kernel name: milliseconds} of the forward and backward pass on `timed`, fastest first. A kernel is
    left out if its results on `checked` differ from the results of `PADDED`, with all queries or with half of them."""
    found: dict[str, float] = {}
    expected = _both(PADDED, checked)
    for name, make in makers.items():
        try:
            kernel = make(device)
            off = distance(_both(kernel, checked), expected)
            if not off <= ERROR:
                raise ArithmeticError(f"its results are off by {off:.0%}")
            results(kernel, *timed)  # warm-up: compilation and memory allocation
            found[name] = 1e3 * min(_seconds(kernel, *timed) for _ in range(ROUNDS))
        except (ModuleNotFoundError, NotAvailable) as error:
            _log.info("attention: %s is not available (%s)", name, error)
        except Exception as error:  # any error: a broken build, or an unsupported GPU or head dimension
            _log.warning("attention: %s is excluded: %s", name, " ".join(str(error).split()) or repr(error))
        else:
            _log.info("attention: %s takes %.3f ms", name, found[name])
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _both(kernel: Kernel, checked: Inputs) -> tuple[Tensor, ...]:
    """Return the results with all queries, and then with half of the queries, as in a model's last block. With half of
    the queries, one sample has no queries."""
    qkv_T3HD, grad_THD, keys = checked
    lengths = (keys.cu_seqlens.diff() + 1) // 2
    lengths[-1] = 0
    ends, rows = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.sum())
    return *results(kernel, *checked), *results(kernel, qkv_T3HD, grad_THD, keys, Segments(ends, keys.max_seqlen, rows))


def example(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, samples: int = 0
) -> Inputs:
    """Return random inputs for `samples` samples (0: `SAMPLES`), of `length` to `length` - 7 rows, but at least one."""
    lengths = [max(1, length - i % 8) for i in range(samples or SAMPLES)]
    rng = torch.Generator().manual_seed(0)
    qkv, grad = (
        torch.randn(sum(lengths), *shape, generator=rng).to(device, dtype)
        for shape in ((3, heads, head_dim), (heads, head_dim))
    )
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return qkv, grad, Segments(ends, length, sum(lengths))


def results(
    kernel: Kernel, qkv_T3HD: Tensor, grad_THD: Tensor, keys: Segments, queries: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Return the result of attention [Q, H, D] and the gradient of qkv [T, 3, H, D], in the dtype of qkv. With
    `queries`, only the first `queries.rows` rows are queries.

    Raises:
        ArithmeticError: the kernel's log-sum-exps do not have the shape [H, Q].
    """
    queries = queries or keys
    q, k, v = qkv_T3HD.unbind(1)
    q, grad = q[: queries.rows], grad_THD[: queries.rows]
    out, lse = kernel.forward(q, k, v, queries, keys)
    if lse.shape != (q.shape[1], q.shape[0]):  # compiled code relies on this shape
        raise ArithmeticError(f"its log-sum-exps have shape {tuple(lse.shape)}")
    grads = torch.empty_like(qkv_T3HD)
    dq, dk, dv = grads.unbind(1)
    dq[queries.rows :] = 0  # these rows are not queries
    kernel.backward(grad, q, k, v, out, lse, dq[: queries.rows], dk, dv, queries, keys)
    return out, grads


def distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest value of norm(got - expected) / norm(expected) over the pairs of tensors; NaN if any value is
    NaN."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, expected)]
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())


def _seconds(kernel: Kernel, qkv_T3HD: Tensor, grad_THD: Tensor, segments: Segments) -> float:
    """Return the mean duration of a forward and backward pass in seconds. On a GPU, it is measured between two events.
    The GPU is first kept waiting while the host launches the kernels, so that launch times have no effect."""
    inputs = qkv_T3HD, grad_THD, segments
    if qkv_T3HD.device.type != "cuda":
        started = time.perf_counter()
        for _ in range(ROUNDS):
            results(kernel, *inputs)
        return (time.perf_counter() - started) / ROUNDS
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    for _ in range(ROUNDS):
        results(kernel, *inputs)
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / ROUNDS


# The available kernels. The argument names are those of flash-attn 2.8 and, as of 2026, those in the folders hopper/
# and flash_attn/cute/ of its repository. Versions with other argument names raise TypeError and are excluded.


def _flash_attn_2(device: torch.device) -> Kernel:
    from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )

    def forward(q, k, v, queries, keys):
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, **_ends(queries, keys), dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False
        )
        return out, lse

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse, dq, dk, dv, **_ends(queries, keys), dropout_p=0.0,
            softmax_scale=q.shape[-1] ** -0.5, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return Kernel("flash-attn 2", forward, backward)


def _flash_attn_3(device: torch.device) -> Kernel:
    try:
        from flash_attn_3 import flash_attn_interface  # type: ignore[import-not-found]
    except ImportError:  # older builds install only the module below
        import flash_attn_interface  # type: ignore[import-not-found]

    def forward(q, k, v, queries, keys):
        out, lse, *_ = flash_attn_interface._flash_attn_forward(
            q, k, v, **_ends(queries, keys), softmax_scale=q.shape[-1] ** -0.5
        )
        return out, lse

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        flash_attn_interface._flash_attn_backward(
            grad, q, k, v, out, lse, **_ends(queries, keys), dq=dq, dk=dk, dv=dv, softmax_scale=q.shape[-1] ** -0.5,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return Kernel("flash-attn 3", forward, backward)


def _flash_attn_4(device: torch.device) -> Kernel:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # type: ignore[import-not-found]

    def forward(q, k, v, queries, keys):
        return _flash_attn_fwd(q, k, v, **_ends(queries, keys), return_lse=True)[:2]

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        _flash_attn_bwd(
            q, k, v, out, grad, lse, **_ends(queries, keys), dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return Kernel("flash-attn 4", forward, backward)


def _ends(queries: Segments, keys: Segments) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }


def _torch_varlen(device: torch.device) -> Kernel:
    def forward(q, k, v, queries, keys):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *_positions(queries, keys), 0.0, False, False)
        return out, lse

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        state, unused = grad.new_zeros(2, dtype=torch.uint64), grad.new_empty(0)  # for dropout
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_positions(queries, keys), 0.0, False, state, unused
        )
        for ours, theirs in zip((dq, dk, dv), grads):
            ours.copy_(theirs)

    return Kernel("torch varlen", forward, backward)


def _cudnn(device: torch.device) -> Kernel:
    """Return cuDNN's kernel. From version 2.14 on, torch's own attention over packed samples uses this kernel for
    samples of more than 128 rows. Earlier versions never use it. If they did, the backward pass of torch's op would
    confuse the head dimension with the number of rows of the longest sample, and write out of bounds
    (pytorch/pytorch#186142). Raises NotAvailable if torch would not use it."""
    from torch.nn.attention import varlen

    if not varlen._should_use_cudnn(device.index or 0):
        raise NotAvailable(
            "packed samples require torch 2.14 or newer, cuDNN 9.18 or newer, and a GPU of architecture sm_90 or sm_100"
        )

    def lengths(queries, keys):
        most = (max(segments.max_seqlen, CUDNN_ROWS) for segments in (queries, keys))
        return dict(zip(("cum_seq_q", "cum_seq_k", "max_q", "max_k"), (queries.cu_seqlens, keys.cu_seqlens, *most)))

    def forward(q, k, v, queries, keys):
        return torch.ops.aten._cudnn_attention_forward(
            query=q, key=k, value=v, attn_bias=None, **lengths(queries, keys), compute_log_sumexp=True
        )[:2]

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        state = grad.new_zeros(2, dtype=torch.uint64)  # for dropout
        grads = torch.ops.aten._cudnn_attention_backward(
            grad_out=grad, query=q, key=k, value=v, out=out, logsumexp=lse, **lengths(queries, keys), dropout_p=0.0,
            philox_seed=state, philox_offset=state, attn_bias=None, is_causal=False,
        )  # fmt: skip
        for ours, theirs in zip((dq, dk, dv), grads):
            ours.copy_(theirs)

    return Kernel("cuDNN", forward, backward)


def _triton(device: torch.device) -> Kernel:
    from ..triton_impl.attention import TRITON

    if not tuning.fits(device):
        raise NotAvailable("the Triton kernels do not support this GPU")
    return TRITON


def _positions(queries: Segments, keys: Segments) -> Sequence[Tensor | int]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen


MAKERS: dict[str, Maker] = {
    "flash-attn 4": _flash_attn_4,
    "flash-attn 3": _flash_attn_3,
    "flash-attn 2": _flash_attn_2,
    "cuDNN": _cudnn,
    "torch varlen": _torch_varlen,
    "triton": _triton,
}
