"""Kernel of `masked_token_loss`, which processes rows in chunks, as Liger's fused linear cross-entropy does
(https://arxiv.org/abs/2410.10989): 1. a plain matrix product computes the logits; 2. one kernel computes the losses and
replaces the logits by their gradients; 3. two plain matrix products compute the other gradients.

Inner sizes are zero-padded to multiples of 16, because vendor BLAS needs 16-byte-aligned rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..dispatch import accumulator
from ..token_arguments import Inputs, Options, Results
from ..tuning import config
from .common import acc_type, launcher, padded, up
from .matmul import add_product, even_chunks, workspace_rows

VOCAB_MULTIPLE = 64
ROW_MULTIPLE = 128


@triton.jit(
    do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=["targets", "unit_weight", "row_loss", "correct"]
)
def token_rows_kernel(
    logits, targets, unit_weight, row_loss, correct, V, stride, ignore_index, smoothing, z_loss,
    GRAD: tl.constexpr, CORRECT: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Process one row of logits [V] per program instance: compute its loss, and whether its target is the first of the
    largest logits. If gradients are needed, replace the logits by unit_weight times the gradient of the loss with
    respect to each logit.

    The row is read twice. The second pass finds it in the caches (61 kB for a vocabulary of 30522 in 16 bits), so
    memory is read once and written once. Cost: 4MV bytes, and one exponential per element in each pass. For M3AE-Large
    at 512 samples (M 24576, V 30522), 3 GB take 0.9 ms at 3.35 TB/s, and 1.5e9 exponentials take 0.42 ms at 16 per
    cycle on each of 132 multiprocessors. The whole loss requires 6MVD FLOPs, which take 2.3 ms on the tensor cores, and
    five passes over the logits, which take 2.2 ms.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK_V)
    target = tl.load(targets + row)
    counted = target != ignore_index
    inside = counted & (target >= 0) & (target < V)
    # The target's logit is read before any thread writes. If the target is out of range, nothing is read, and the
    # loss is NaN.
    logit = tl.load(logits + target, mask=inside, other=float("nan")).to(ACC)
    column = tl.where(inside, target, -1).to(tl.int32)
    # 1. Online softmax (algorithm 3 of https://arxiv.org/abs/1805.02867) in each lane: the maximum m, its first
    # position, the sum d of exponentials, and the sum of logits. They are reduced across lanes once. m starts with a
    # finite value, so that a logit of -inf has a probability of 0 and does not cause NaN.
    m = tl.full((BLOCK_V,), -3.0e38, dtype=ACC)
    d = tl.zeros((BLOCK_V,), dtype=ACC)
    argmax = tl.zeros((BLOCK_V,), dtype=tl.int32)
    sums = tl.zeros((BLOCK_V,), dtype=ACC)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + lane
        # The mask ends at a multiple of 16, so loads vectorise; columns from V to stride are padding.
        x = tl.where(v < V, tl.load(logits + v, mask=v < stride, other=0).to(ACC), float("-inf"))
        above = x > m
        e = tl.exp(-tl.abs(x - m))
        d = tl.where(above, d * e + 1, d + e)
        m = tl.where(above, x, m)
        if CORRECT:
            argmax = tl.where(above, v, argmax)
        if SMOOTH:
            sums += tl.where(v < V, x, 0)
    m_row = tl.max(m, 0)
    lse = m_row + tl.log(tl.sum(d * tl.exp(m - m_row), 0))
    loss = (1 - smoothing) * (lse - logit) + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (lse - tl.sum(sums, 0) / V)
    tl.store(row_loss + row, tl.where(counted, loss, 0))
    if CORRECT:
        first = tl.min(tl.where(m == m_row, argmax, V), 0)
        tl.store(correct + row, (first == column).to(tl.int8))
    # 2. The gradient of the loss, in place of the logits.
    if GRAD:
        weight = tl.load(unit_weight + row)
        level = 1 + 2 * z_loss * lse
        for v0 in range(0, stride, BLOCK_V):
            v = v0 + lane
            grad = tl.exp(tl.load(logits + v, mask=v < stride, other=0).to(ACC) - lse) * level
            if SMOOTH:
                grad -= smoothing / V
            grad = tl.where(v == column, grad - (1 - smoothing), grad) * weight
            tl.store(logits + v, tl.where(counted & (v < V), grad, 0), mask=v < stride)


@launcher
def token_loss(inputs: Inputs, options: Options, needs: Sequence[bool], results: Results) -> None:
    """Write the results in place. Of the gradients, only those selected by `needs` are written. hidden, weight and bias
    must have the same dtype, and the row weight of an ignored row must be 0."""
    hidden, weight, bias, unit_weight, targets = inputs
    row_loss, correct, grad_hidden, grad_weight, grad_bias = results
    assert options.workspace is not None
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    (count, dim), vocab = hidden.shape, len(weight)
    wide, stride = up(dim), up(vocab, VOCAB_MULTIPLE)
    targets, hidden, weight = (
        targets.contiguous(),
        padded(hidden, count, wide, dtype),
        padded(weight, stride, wide, dtype),
    )
    bias = None if bias is None else padded(bias[None], 1, stride, dtype)[0]
    most = max(1, options.workspace // (stride * dtype.itemsize))
    chunk = even_chunks(count, most, ROW_MULTIPLE)
    space = hidden.new_empty(workspace_rows(count, most), stride)
    columns, last = hidden, dim if needs[1] else 0
    if needs[2]:
        # The gradient of the bias is computed as the gradient of an additional column of the weight whose inputs are 1.
        # This saves a further pass over the logits.
        columns = torch.cat((hidden[:, :last], hidden.new_ones(count, 1)), 1)
        columns = padded(columns, count, up(last + 1), dtype)
    shape = (stride if needs[1] or needs[2] else 0, columns.shape[1])
    direct = grad_weight.dtype == acc and grad_weight.shape == shape
    total = grad_weight if direct else hidden.new_empty(shape, dtype=acc)
    tile = config("token_rows", hidden.device, dtype)
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        logits = space[: rows.stop - start]
        if bias is None:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.t(), out=logits)
        token_rows_kernel[(len(logits),)](
            logits, targets[rows], unit_weight[rows], row_loss[rows], correct[rows].view(torch.int8), vocab, stride,
            options.ignore_index, options.label_smoothing, options.z_loss,
            GRAD=any(needs), CORRECT=len(correct) > 0, SMOOTH=options.label_smoothing > 0, ACC=acc_type(dtype), **tile,
        )  # fmt: skip
        if needs[0] and wide == dim:
            torch.mm(logits, weight, out=grad_hidden[rows])
        elif needs[0]:
            grad_hidden[rows] = (logits @ weight)[:, :dim]
        if needs[1] or needs[2]:
            add_product(total, logits.t(), columns[rows], start == 0)
    if needs[1] and not direct:
        grad_weight.copy_(total[:vocab, :dim])
    if needs[2]:
        grad_bias.copy_(total[:vocab, last])
