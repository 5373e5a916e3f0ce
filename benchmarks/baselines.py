"""Baselines of the ops: plain torch, torch.compile, the matmuls alone (on a GPU, by cuBLAS), and the losses and
attention of torch and of other installed libraries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from m3ae_kernels import reference
from m3ae_kernels.attention import Kernel, Segments, cuda
from m3ae_kernels.attention.padded import padded_attention
from m3ae_kernels.tuning.workloads import Workload
from torch import Tensor

CHUNKS = 4  # number of chunks of rows for losses that compute logits in chunks
# value of Liger's `chunk_mem_const` that gives few chunks; its default gives 48 chunks at M3AE-Large's sizes
LIGER_CHUNKS = 16


def baselines(work: Workload, compiled: bool = True) -> dict[str, object]:
    """Return the baselines of an op by name. Each baseline is a module that contains a function with the name of the
    op. `compiled`: whether to include torch.compile."""
    found: dict[str, Callable] = {"eager": getattr(reference, work.op)}
    if compiled:
        found["torch.compile"] = torch.compile(getattr(reference, work.op))
    if work.op == "patch_embed":
        found["matmuls alone"] = _patches_given(work)
    if work.op.endswith("_loss"):
        found["matmuls alone"] = lambda hidden, weight, bias, **_: _Matmuls.apply(hidden, weight, bias)
    if work.op == "packed_attention":
        device = work.tensors["qkv"].device
        others = _kernels(device) if device.type == "cuda" else {}
        found |= {"SDPA": _sdpa} | {name: partial(_of_kernel, kernel) for name, kernel in others.items()}
    if work.op == "masked_token_loss":
        makers = {"torch linear_cross_entropy": _torch, "Liger": _liger, "ml-cross-entropy": _cce}
        found |= {name: loss for name, make in makers.items() if (loss := make()) is not None}
    return {name: SimpleNamespace(**{work.op: function}) for name, function in found.items()}


def _patches_given(work: Workload) -> Callable[..., Tensor]:
    """Return a patch embedding whose patches have been extracted and normalised in advance."""
    weight, ids = work.tensors["weight"], work.tensors["patch_ids"].long()
    rows = reference.patches(work.tensors["images"], dtype=weight.dtype, **work.options)[ids]
    return lambda images, patch_ids, weight, bias, **_: F.linear(rows, weight, bias)


class _Matmuls(torch.autograd.Function):
    """Only the three matmuls of a head and its loss. The outputs of the head also serve as their own
    gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grads, total = [], torch.zeros_like(weight, dtype=torch.float32)
        for part in hidden.tensor_split(CHUNKS):
            out = part @ weight.t()
            grads.append(out @ weight)
            total += out.t() @ part
        ctx.save_for_backward(torch.cat(grads), total.to(weight.dtype), torch.zeros_like(bias))
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def _kernels(device: torch.device) -> dict[str, Kernel]:
    """Return the attention kernels that can be imported; they may still fail on this machine."""
    found = {}
    for name, make in cuda.MAKERS.items():
        with suppress(ImportError, cuda.NotAvailable):
            found[name] = make(device)
    return found


def _segments(qkv, cu_seqlens, max_seqlen, q, cu_queries, max_queries) -> tuple[Segments, Segments]:
    keys = Segments(cu_seqlens, max_seqlen, len(qkv))
    return keys if q is None else Segments(cu_queries, max_queries, len(q)), keys


def _sdpa(qkv, cu_seqlens, max_seqlen, q=None, cu_queries=None, max_queries=None) -> Tensor:
    """Return the result of scaled_dot_product_attention with all samples padded to the longest sample."""
    queries, keys = _segments(qkv, cu_seqlens, max_seqlen, q, cu_queries, max_queries)
    return padded_attention(*(qkv.unbind(1) if q is None else (q, *qkv.unbind(1))), queries, keys)


def _of_kernel(kernel: Kernel, qkv, cu_seqlens, max_seqlen, q=None, cu_queries=None, max_queries=None) -> Tensor:
    queries, keys = _segments(qkv, cu_seqlens, max_seqlen, q, cu_queries, max_queries)
    return _OfKernel.apply(kernel, qkv, q, queries, keys)


class _OfKernel(torch.autograd.Function):
    """Attention computed by a kernel. It is called as in the model, and the gradient of queries, keys and values is one
    tensor."""

    @staticmethod
    def forward(ctx, kernel: Kernel, qkv: Tensor, q: Tensor | None, queries: Segments, keys: Segments) -> Tensor:
        parts = qkv.unbind(1) if q is None else (q, *qkv.unbind(1))
        out, lse = kernel.forward(*parts, queries, keys)
        ctx.save_for_backward(qkv, q, out, lse)
        ctx.kernel, ctx.segments = kernel, (queries, keys)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q, out, lse = ctx.saved_tensors
        parts = qkv.unbind(1) if q is None else (q, *qkv.unbind(1))
        dq, dqkv = None if q is None else torch.empty_like(q), torch.empty_like(qkv)
        grads = dqkv.unbind(1) if dq is None else (dq, *dqkv.unbind(1))
        ctx.kernel.backward(grad.contiguous(), *parts, out, lse, *grads, *ctx.segments)
        return None, dqkv, dq, None, None


# The losses of the libraries are means over rows, without row weights and accuracy.


def _torch() -> Callable[..., Tensor] | None:
    if not hasattr(F, "linear_cross_entropy"):  # before torch 2.13
        return None

    def loss(hidden, weight, bias, targets, **_) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets.long(), linear_bias=bias)

    return loss


def _liger() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
    except ImportError:
        return None
    parameters = inspect.signature(Liger.forward).parameters.values()
    # older versions of Liger lack `chunk_mem_const`
    set_here = {"accum_dtype": torch.float32, "chunk_mem_const": LIGER_CHUNKS}
    options = [set_here.get(p.name, p.default) for p in list(parameters)[5:]]  # without ctx and the four tensors

    def loss(hidden, weight, bias, targets, **_) -> Tensor:
        result = Liger.apply(hidden, weight, targets.long(), bias, *options)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _cce() -> Callable[..., Tensor] | None:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None

    def loss(hidden, weight, bias, targets, **_) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets.long(), bias=bias)

    return loss
