"""Kernels of `masked_token_loss`: logits with their softmax's parts, rows, slopes; then two plain products.

Between the kernels a logit lives as exp(logit - the largest of its row in its tile): in 16 bits its rounding is then
the same small share of every probability, where a rounded logit of 20 would be off by 8 %. The target's logit stays in
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..tuning import config
from .common import acc_type, aligned, cdiv, launcher, precision
from .matmul import even_chunks, product

WORKSPACE_BYTES = 256 << 20  # of one chunk: about 4000 rows of a vocabulary of 30522 in 16 bits
PAD = 64  # rows of the workspace start on so many elements: wide stores, and what the products want
SLOPE_ROWS = 512  # rows whose slopes one program writes and sums for the bias


@triton.jit(do_not_specialize=["M"])
def token_logits_kernel(
    hidden, weight, bias, targets, space, tile_max, tile_sum, tile_total, target_logit, hit, M, V, D, stride,
    STORE: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits hidden [M, D] @ weight [V, D].T + bias, one tile a program: by row of the tile their largest, the sum of
    exp(logit - largest) and, for label smoothing, their sum, each [tiles of V, M]; the exponentials (space [M,
    stride]) where gradients are wanted; for the target's tile its logit, and whether it is the tile's first largest.

    FLOPs 2MVD; bytes at least 2MD + 2VD + 2MV. M3AE-Large at 512 samples (M 24576, V 30522, D 512): 768 GFLOP, 777 us
    at 989 TFLOP/s; 1.56 GB, 465 us at 3.35 TB/s. The whole loss, 6MVD and four passes more over the exponentials: 2.3
    ms of tensor cores, 2.2 ms of memory.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid // tiles_m  # rows vary fastest: a tile of the weight, the larger operand, is read once
    m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for d0 in range(0, D, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        h = tl.load(
            hidden + m.to(tl.int64)[:, None] * D + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0
        )
        w = tl.load(
            weight + n.to(tl.int64)[None, :] * D + d[:, None], mask=(n < V)[None, :] & (d < D)[:, None], other=0
        )
        acc = tl.dot(h, w, acc, input_precision=PRECISION, out_dtype=ACC)
    acc += tl.load(bias + n, mask=n < V, other=0).to(ACC)[None, :]
    at = tile.to(tl.int64) * M + m
    if SMOOTH:
        tl.store(tile_total + at, tl.sum(tl.where((n < V)[None, :], acc, 0), 1), mask=m < M)
    acc = tl.where((n < V)[None, :], acc, float("-inf"))
    largest = tl.max(acc, 1)
    target = tl.load(targets + m, mask=m < M, other=-1)
    here = (target >= tile * BLOCK_N) & (target < tile * BLOCK_N + BLOCK_N)
    of_target = tl.sum(tl.where(n[None, :] == target[:, None], acc, 0), 1)
    first = tl.min(tl.where(acc == largest[:, None], n[None, :], V), 1)
    tl.store(target_logit + m, of_target, mask=here)
    tl.store(hit + m, (first == target).to(tl.int8), mask=here)
    acc = tl.exp(acc - tl.where(largest == float("-inf"), 0, largest)[:, None])
    tl.store(tile_max + at, largest, mask=m < M)
    tl.store(tile_sum + at, tl.sum(acc, 1), mask=m < M)
    if STORE:
        # The padding is written too: its mask divides by 16, so that the stores are wide.
        mask = (m < M)[:, None] & (n < stride)[None, :]
        tl.store(space + m.to(tl.int64)[:, None] * stride + n[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M"])
def token_rows_kernel(
    tile_max, tile_sum, tile_total, target_logit, hit, targets, share, row_loss, correct, target_slope, M, V, tiles,
    smoothing, z_loss,
    STORE: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, TILE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """From the tiles' parts each row's loss and whether it is right; then, in place of tile_max, the factor that turns
    a tile's exponentials into slopes, and the target's slope.

    Bytes 16M a tile: 94 MB, 28 us at 3.35 TB/s for M3AE-Large at 512 samples with tiles 128 wide.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    logit = tl.load(target_logit + m, mask=inside, other=0)
    target_tile = tl.load(targets + m, mask=inside, other=0) // TILE_WIDTH
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    sum_logits = tl.zeros((BLOCK_M,), dtype=ACC)
    better = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * M + m[None, :]
        mask = (t < tiles)[:, None] & inside[None, :]
        part = tl.load(tile_max + at, mask=mask, other=float("-inf"))
        new = tl.maximum(largest, tl.max(part, 0))
        safe = tl.where(new == float("-inf"), 0, new)
        sums = tl.load(tile_sum + at, mask=mask, other=0)
        total = total * tl.exp(largest - safe) + tl.sum(sums * tl.exp(part - safe[None, :]), 0)
        largest = new
        # Of equal logits the first counts as the largest.
        before = t[:, None] < target_tile[None, :]
        beats = (part > logit[None, :]) | (before & (part == logit[None, :]))
        better += tl.sum((beats & mask).to(tl.int32), 0)
        if SMOOTH:
            sum_logits += tl.sum(tl.load(tile_total + at, mask=mask, other=0), 0)
    lse = tl.where(inside, largest + tl.log(tl.where(inside, total, 1)), 0)
    loss = (1 - smoothing) * (lse - logit) + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (lse - sum_logits / V)
    tl.store(row_loss + m, loss, mask=inside)
    right = (better == 0) & (tl.load(hit + m, mask=inside, other=0) != 0)
    tl.store(correct + m, right.to(tl.int8), mask=inside)
    if STORE:
        w = tl.load(share + m, mask=inside, other=0)
        level = 1 + 2 * z_loss * lse
        slope = w * (tl.exp(logit - lse) * level - (1 - smoothing) - smoothing / V)
        tl.store(target_slope + m, slope, mask=inside)
        for t0 in range(0, tiles, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            at = t.to(tl.int64)[:, None] * M + m[None, :]
            mask = (t < tiles)[:, None] & inside[None, :]
            part = tl.load(tile_max + at, mask=mask, other=float("-inf"))
            tl.store(tile_max + at, w[None, :] * level[None, :] * tl.exp(part - lse[None, :]), mask=mask)


@triton.jit(do_not_specialize=["M"])
def token_slope_kernel(
    space, factor, targets, target_slope, share, tile_bias, M, V, stride, smoothing,
    SMOOTH: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Exponentials to slopes, in place, for ROWS rows and BLOCK_N columns a program, and their sums by column
    (tile_bias [row blocks, V]). Bytes 4MV in 16 bits: 3 GB, 0.9 ms for M3AE-Large at 512 samples."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) * BLOCK_N // TILE_WIDTH
    block = tl.program_id(1)
    total = tl.zeros((BLOCK_N,), dtype=ACC)
    for m0 in range(block * ROWS, tl.minimum((block + 1) * ROWS, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (n < stride)[None, :]
        at = space + m.to(tl.int64)[:, None] * stride + n[None, :]
        f = tl.load(factor + tile.to(tl.int64) * M + m, mask=m < M, other=0)
        value = tl.load(at, mask=mask, other=0).to(ACC) * f[:, None]
        if SMOOTH:
            value -= (tl.load(share + m, mask=m < M, other=0) * (smoothing / V))[:, None]
        target = tl.load(targets + m, mask=m < M, other=-1)
        exact = tl.load(target_slope + m, mask=m < M, other=0)
        value = tl.where(n[None, :] == target[:, None], exact[:, None], value)
        tl.store(at, value, mask=mask)
        total += tl.sum(tl.where(mask, value, 0), 0)
    tl.store(tile_bias + block.to(tl.int64) * V + n, total, mask=n < V)


@launcher
def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    share: Tensor,
    targets: Tensor,
    smoothing: float,
    z_loss: float,
    row_loss: Tensor,
    correct: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Fills row_loss [M], correct [M], and the gradients that have room; hidden, weight and bias have one dtype."""
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    count, vocab = len(hidden), len(weight)
    hidden, bias, targets = hidden.contiguous(), bias.contiguous(), targets.contiguous()
    wide_hidden, wide_weight = aligned(hidden), aligned(weight)
    wanted = bool(grad_hidden.numel() or grad_weight.numel())
    tile = config("token_logits", hidden.device, dtype)
    rows_tile, slope_tile = config("token_rows", hidden.device, dtype), config("token_slope", hidden.device, dtype)
    width = tile["BLOCK_N"]
    tiles = cdiv(vocab, width)
    stride = cdiv(vocab, PAD) * PAD
    chunk = even_chunks(count, WORKSPACE_BYTES // (stride * dtype.itemsize), tile["BLOCK_M"])
    space = hidden.new_empty(chunk if wanted else 0, stride)
    sum_weight = torch.zeros_like(grad_weight, dtype=acc) if chunk < count else None
    grad_bias.zero_()
    shared = {"SMOOTH": smoothing > 0, "ACC": acc_type(dtype)}
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        size = rows.stop - start
        target, w = targets[rows], share[rows]
        tile_max, tile_sum = share.new_empty(2, tiles, size)
        tile_total = share.new_empty((tiles, size) if smoothing > 0 else 0)
        target_logit, target_slope = share.new_empty(2, size)
        hit = correct.new_empty(size, dtype=torch.int8)
        token_logits_kernel[(cdiv(size, tile["BLOCK_M"]) * tiles,)](
            wide_hidden[rows], wide_weight, bias, target, space, tile_max, tile_sum, tile_total, target_logit, hit,
            size, vocab, wide_weight.shape[1], stride, STORE=wanted, PRECISION=precision(dtype), **shared, **tile,
        )  # fmt: skip
        token_rows_kernel[(cdiv(size, rows_tile["BLOCK_M"]),)](
            tile_max, tile_sum, tile_total, target_logit, hit, target, w, row_loss[rows],
            correct[rows].view(torch.int8), target_slope, size, vocab, tiles, smoothing, z_loss,
            STORE=wanted, TILE_WIDTH=width, **shared, **rows_tile,
        )  # fmt: skip
        if not wanted:
            continue
        blocks = cdiv(size, SLOPE_ROWS)
        tile_bias = share.new_empty(blocks, vocab)
        token_slope_kernel[(cdiv(vocab, slope_tile["BLOCK_N"]), blocks)](
            space, tile_max, target, target_slope, w, tile_bias, size, vocab, stride, smoothing,
            ROWS=SLOPE_ROWS, TILE_WIDTH=width, **shared, **slope_tile,
        )  # fmt: skip
        slope = space[:size, :vocab]
        if grad_hidden.numel():
            torch.mm(slope, weight, out=grad_hidden[rows])
        if grad_weight.numel():
            grad_bias += tile_bias.sum(0)
            if sum_weight is not None:
                sum_weight += product(slope.t(), hidden[rows], acc)
            else:
                grad_weight.copy_(product(slope.t(), hidden[rows], grad_weight.dtype))
    if sum_weight is not None:
        grad_weight.copy_(sum_weight)
