"""Kernels of the HOG targets; ../hog.py describes the targets.

1. The squared norm of each patch's histogram, for all patches (`hog_energy`): one number per patch.
2. The histograms of the predicted patches, which are normalised by the norms of their neighbours (`hog_targets`).
   Reading the pixels twice needs less memory than storing the histograms of all patches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..hog import CENTRE, EPS, LARGEST_SHARE, SPREAD
from ..pixels import count_patches, planar
from ..tuning import config
from .common import acc_type, cdiv, channel_table, in_place, launcher

NORM_EPS, MOST, MIDDLE, WIDTH = (tl.constexpr(value) for value in (EPS, LARGEST_SHARE, CENTRE, SPREAD))
BINS = tl.constexpr(9)
# 9 / pi times the arctangent of t, for t in [0, 1], is approximated by t times this polynomial of t ** 2. Of all
# polynomials of its degree, it has the smallest maximum error, 1.1e-7.
A0, A1, A2, A3, A4, A5, A6, A7 = (
    tl.constexpr(value)
    for value in (
        2.8647870722449746, -0.9548301776753876, 0.5714270152261733, -0.39845288637563525,
        0.27622859550810547, -0.16017699177821887, 0.06263273722075297, -0.01161547172916233,
    )
)  # fmt: skip


@triton.jit
def orientation(dx, dy):
    """Return the orientation of gradients, from 0 to 9 for 0 to 180 degrees."""
    wide, high = tl.abs(dx), tl.abs(dy)
    longer = tl.maximum(wide, high)
    t = tl.minimum(wide, high) / tl.where(longer > 0, longer, 1)
    s = t * t
    place = t * (A0 + s * (A1 + s * (A2 + s * (A3 + s * (A4 + s * (A5 + s * (A6 + s * A7)))))))
    place = tl.where(high > wide, 4.5 - place, place)
    return tl.where((dx < 0) != (dy < 0), 9 - place, place)


@triton.jit
def histograms(
    images, ids, rows, table,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the mean votes of the pixels of patches, [BLOCK_M, 16], of which the first 9 columns are used. `rows`:
    whether each id is that of a patch; `table`: factors of the channels."""
    grid_w: tl.constexpr = W // P
    patches: tl.constexpr = grid_w * (H // P)
    STEP: tl.constexpr = 1 if PLANAR else C  # stride between neighbouring pixels
    patch = (ids % patches).to(tl.int32)
    start = images + (ids // patches).to(tl.int64)[:, None] * (C * H * W)
    top, left = (patch // grid_w * P)[:, None], (patch % grid_w * P)[:, None]
    column = tl.arange(0, 16)[None, :]
    total = tl.zeros((BLOCK_M, 16), dtype=ACC)
    for k0 in range(0, P * P, BLOCK_D):
        k = k0 + tl.arange(0, BLOCK_D)[None, :]
        mask = rows[:, None] & (k < P * P)
        y, x = top + k // P, left + k % P
        before, after = (y * W + tl.maximum(x - 1, 0)) * STEP, (y * W + tl.minimum(x + 1, W - 1)) * STEP
        above, below = (tl.maximum(y - 1, 0) * W + x) * STEP, (tl.minimum(y + 1, H - 1) * W + x) * STEP
        dx = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
        dy = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
        for c in range(C):
            scale = tl.load(table + c).to(ACC)
            channel = start + (c * (H * W) if PLANAR else c)
            a = tl.load(channel + after, mask=mask, other=0).to(ACC)
            b = tl.load(channel + before, mask=mask, other=0).to(ACC)
            dx += scale * (a - b)
            a = tl.load(channel + below, mask=mask, other=0).to(ACC)
            b = tl.load(channel + above, mask=mask, other=0).to(ACC)
            dy += scale * (a - b)
        size = tl.sqrt(dx * dx + dy * dy)
        place = orientation(dx, dy)
        for bin in tl.static_range(BINS):
            away = tl.abs(place - bin)
            votes = size * tl.maximum(1 - tl.minimum(away, 9 - away), 0)
            total += tl.where(column == bin, tl.sum(votes, 1)[:, None], 0)
    return total / (P * P)


@triton.jit(do_not_specialize=["N"])
def hog_energy_kernel(
    images, energy, N, table,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the sum of the squares of each patch's histogram (energy [N]). Cost: N P P C bytes for uint8, which take
    30 us at 3.35 TB/s for 131,072 patches of 768 elements, and about 80 operations for each of the P * P pixels, which
    take 40 us at 67 TFLOP/s. Each value is loaded four times; all but the first loads hit the cache."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    votes = histograms(images, m, m < N, table, P, C, H, W, PLANAR, ACC, BLOCK_M, BLOCK_D)
    tl.store(energy + m, tl.sum(votes * votes, 1), mask=m < N)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids"])
def hog_targets_kernel(
    images, ids, energy, out, N, table,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the targets (out [N, 9]) of the patches `ids` [N] from their pixels and the `energy` of all patches.
    Cost: as `hog_energy` for N patches."""
    grid_w: tl.constexpr = W // P
    grid_h: tl.constexpr = H // P
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    patch = tl.load(ids + m, mask=m < N, other=0)
    row, column = patch % (grid_w * grid_h) // grid_w, patch % grid_w
    squares = tl.zeros((BLOCK_M,), dtype=ACC)
    cells = tl.zeros((BLOCK_M,), dtype=ACC)
    for neighbour in tl.static_range(9):
        down, right = neighbour // 3 - 1, neighbour % 3 - 1
        y, x = row + down, column + right
        inside = (y >= 0) & (y < grid_h) & (x >= 0) & (x < grid_w)
        at = patch + down * grid_w + right
        squares += tl.load(energy + at, mask=(m < N) & inside, other=0)
        cells += tl.where(inside, 1, 0)
    norm = tl.sqrt(squares * 9 / cells) + NORM_EPS
    votes = histograms(images, patch, m < N, table, P, C, H, W, PLANAR, ACC, BLOCK_M, BLOCK_D)
    shares = tl.minimum(votes / norm[:, None], MOST)
    n = tl.arange(0, 16)
    places = out + m.to(tl.int64)[:, None] * BINS + n[None, :]
    tl.store(places, (shares - MIDDLE) / WIDTH, mask=(m < N)[:, None] & (n < BINS)[None, :])


@launcher
def fill_targets(images: Tensor, ids: Tensor, patch_size: int, scale, out: Tensor) -> None:
    """Fill `out` [M, 9] with the targets of the patches `ids` [M]."""
    images = in_place(images)
    channels, height, width = images.shape[1:]
    sizes: dict[str, Any] = {"P": patch_size, "C": channels, "H": height, "W": width, "PLANAR": planar(images)}
    sizes |= {"table": channel_table(tuple(scale), images.device), "ACC": acc_type(out.dtype)}
    tile = config("hog", images.device, torch.float32)
    elements = tile.pop("TILE")
    block_d = min(triton.next_power_of_2(patch_size**2), elements)
    tile = {"BLOCK_M": elements // block_d, "BLOCK_D": block_d} | tile
    patches = count_patches(images, patch_size)
    energy = out.new_empty(patches)
    hog_energy_kernel[(cdiv(patches, tile["BLOCK_M"]),)](images, energy, patches, **sizes, **tile)
    rows = len(out)
    hog_targets_kernel[(cdiv(rows, tile["BLOCK_M"]),)](images, ids.contiguous(), energy, out, rows, **sizes, **tile)
