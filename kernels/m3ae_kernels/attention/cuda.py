"""Attention kernels on CUDA GPUs: the fastest of those in flash-attn (2, 3 and 4) and torch.

None wins everywhere: flash-attn 3 pads a head of 32 values to 64 and works in tiles of 192 keys, which a sample of
70 visible tokens fills in part; flash-attn 2 has neither fault and lacks Hopper's instructions. So each is tried on
random samples of a given length, once, forward and backward. One that is not installed, fails or computes something
else is left out, and the log says why. Triton's takes no part: no GPU has
measured it yet.

Shapes: Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kernel import Kernel, Segments
from .padded import PADDED

SAMPLES = 64  # of a check
HALVES = (torch.bfloat16, torch.float16)
HEAD_START = 20_000_000  # cycles that a GPU waits for the host's launches: some 10 ms
ROUNDS = 3  # of a trial, each of as many calls
ERROR = 0.03  # of norms: the most by which two kernels may differ in bf16

Inputs = tuple[Tensor, Tensor, Segments]  # qkv, a gradient of the result, the samples

_log = logging.getLogger(__name__)
_chosen: dict[tuple, dict[int, Kernel]] = {}  # by device, dtype, heads and head size: by length


def choose(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Return the fastest kernel for samples of about `length` rows. Tried once for each kind of head; later lengths get
    the choice for the nearest of those that were asked for with `try_out`."""
    choices = _chosen.get((device, dtype, heads, head_dim))
    if choices is None:
        return try_out(device, dtype, heads, head_dim, length)
    return choices[min(choices, key=lambda known: abs(math.log(known / length)))]


def try_out(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Choose as `choose` does, with a trial at `length` unless there has been one."""
    if dtype not in HALVES:
        return PADDED
    choices = _chosen.setdefault((device, dtype, heads, head_dim), {})
    if length not in choices:
        times = trial(device, dtype, heads, head_dim, length)
        settle(device, dtype, heads, head_dim, length, next(iter(times), PADDED.name))
    return choices[length]


def trial(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, samples: int = 0
) -> dict[str, float]:
    """Return by name the milliseconds of each kernel that works, the fastest first, for so many samples (0: `SAMPLES`)
    of about `length` rows."""
    if dtype not in HALVES:
        return {}
    inputs = example(device, dtype, heads, head_dim, length)
    return fastest(MAKERS, inputs, example(device, dtype, heads, head_dim, length, samples) if samples else inputs)


def settle(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, name: str) -> None:
    """Let samples of about `length` rows run on the kernel of this name, which another process may have chosen. Raises
    KeyError where nobody knows it, and what its maker raises where it is not installed here."""
    kernel = PADDED if name == PADDED.name else MAKERS[name]()
    _chosen.setdefault((device, dtype, heads, head_dim), {})[length] = kernel


def fastest(makers: dict[str, Callable[[], Kernel]], checked: Inputs, timed: Inputs) -> dict[str, float]:
    """Return by name the milliseconds, forward and backward of `timed`, of the kernels that compute `checked` as
    `PADDED` does; the fastest first."""
    found: dict[str, float] = {}
    expected = results(PADDED, *checked)
    for name, make in makers.items():
        try:
            kernel = make()
            off = distance(results(kernel, *checked), expected)
            if not off <= ERROR:
                raise ArithmeticError(f"its results are off by {off:.0%}")
            results(kernel, *timed)  # compiled, and its memory reserved
            found[name] = 1e3 * min(_seconds(kernel, *timed) for _ in range(ROUNDS))
        except ModuleNotFoundError as error:
            _log.info("attention: %s is not installed (%s)", name, error)
        except Exception as error:  # of any kind: a broken build, a GPU or head size that it was not made for
            _log.warning("attention: %s is left out: %s", name, " ".join(str(error).split()) or repr(error))
        else:
            _log.info("attention: %s takes %.3f ms", name, found[name])
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def example(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int, samples: int = 0
) -> Inputs:
    """Return random inputs of so many samples (0: `SAMPLES`), some shorter than `length`."""
    lengths = [max(1, length - i % 8) for i in range(samples or SAMPLES)]
    rng = torch.Generator().manual_seed(0)
    qkv, grad = (
        torch.randn(sum(lengths), *shape, generator=rng).to(device, dtype)
        for shape in ((3, heads, head_dim), (heads, head_dim))
    )
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return qkv, grad, Segments(ends, length, sum(lengths))


def results(kernel: Kernel, qkv_T3HD: Tensor, grad_THD: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Return attention's result and the gradient of qkv."""
    q, k, v = qkv_T3HD.unbind(1)
    out, lse = kernel.forward(q, k, v, segments, segments)
    grads = torch.empty_like(qkv_T3HD)
    kernel.backward(grad_THD, q, k, v, out, lse, *grads.unbind(1), segments, segments)
    return out, grads


def distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative distance; NaN where something is."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, expected)]
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())


def _seconds(kernel: Kernel, qkv_T3HD: Tensor, grad_THD: Tensor, segments: Segments) -> float:
    """Return the time of one pass; on a GPU between events, with the host so far ahead that its own time does not
    count."""
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


# What there is. Names of arguments are those of flash-attn 2.8 and of its hopper/ and flash_attn/cute/ in 2026; a
# version that has others raises TypeError and is left out.


def _flash_attn_2() -> Kernel:
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
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip

    return Kernel("flash-attn 2", forward, backward)


def _flash_attn_3() -> Kernel:
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward  # type: ignore[import-not-found]

    def forward(q, k, v, queries, keys):
        out, lse, *_ = _flash_attn_forward(q, k, v, **_ends(queries, keys), softmax_scale=q.shape[-1] ** -0.5)
        return out, lse

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        options = {"dq": dq, "dk": dk, "dv": dv, "softmax_scale": q.shape[-1] ** -0.5}
        _flash_attn_backward(grad, q, k, v, out, lse, **_ends(queries, keys), **options)

    return Kernel("flash-attn 3", forward, backward)


def _flash_attn_4() -> Kernel:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # type: ignore[import-not-found]

    def forward(q, k, v, queries, keys):
        return _flash_attn_fwd(q, k, v, **_ends(queries, keys), return_lse=True)[:2]

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        _flash_attn_bwd(q, k, v, out, grad, lse, **_ends(queries, keys), dq=dq, dk=dk, dv=dv)

    return Kernel("flash-attn 4", forward, backward)


def _ends(queries: Segments, keys: Segments) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }


def _torch_varlen() -> Kernel:
    def forward(q, k, v, queries, keys):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *_positions(queries, keys), 0.0, False, False)
        return out, lse

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries, keys):
        state, unused = grad.new_zeros(2, dtype=torch.uint64), grad.new_empty(0)  # of dropout
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_positions(queries, keys), 0.0, False, state, unused
        )
        for ours, theirs in zip((dq, dk, dv), grads):
            ours.copy_(theirs)

    return Kernel("torch varlen", forward, backward)


def _positions(queries: Segments, keys: Segments) -> Sequence[Tensor | int]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen


MAKERS: dict[str, Callable[[], Kernel]] = {
    "flash-attn 4": _flash_attn_4,
    "flash-attn 3": _flash_attn_3,
    "flash-attn 2": _flash_attn_2,
    "torch varlen": _torch_varlen,
}
