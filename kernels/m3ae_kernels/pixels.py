"""Extraction of patches from images in plain torch, shared by `patch_embed` and `masked_pixel_loss`.

Inside the ops, the values of a patch have the order of the image in memory: (channel, row, column) for contiguous
images, and (row, column, channel) for channels_last images. The weights that callers pass always have the second order.
For contiguous images, the weight is therefore permuted, which needs only a small copy. The forward pass of
`patch_embed` in torch permutes the patches instead.

Shapes: B images, C channels, H x W pixels, P patch size, N rows, K = P * P * C.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import DTYPES, check_index, check_tensor, is_integer
from .ids import check_distinct, check_range, checked, checks_enabled
from .wide import widest

NORM_PIX_EPS = 1e-6
# largest value of integer pixels, which corresponds to 1 in mean and std
LARGEST = {torch.uint8: 255, torch.uint16: 65535}


def check_pixels(
    images: Tensor, patch_ids: Tensor, patch_size: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Check the image arguments, and return (scale, shift) per channel such that pixel * scale + shift = (pixel /
    largest - mean) / std, where `largest` is 1 for floating-point images. Both lists are empty for floating-point
    images that are used unchanged.

    Raises:
        TypeError, ValueError: the named argument is wrong.
    """
    check_images(images, patch_ids, patch_size)
    if images.is_floating_point() and mean is None and std is None:
        return [], []
    channels = images.shape[1]
    means, stds = (per_channel(values, channels) for values in (mean, std))
    if means is None or stds is None:
        kind = str(images.dtype).removeprefix("torch.")
        neither = ", or neither" if images.is_floating_point() else ""
        raise ValueError(
            f"{kind} images need mean and std with one number for each of their {channels} channels{neither}"
        )
    if not all(abs(value) < math.inf for value in means):  # also false for NaN
        raise ValueError(f"mean must be finite, got {tuple(means)}")
    if not all(0 < value < math.inf for value in stds):
        raise ValueError(f"std must be positive and finite, got {tuple(stds)}")
    largest = LARGEST.get(images.dtype, 1)
    return [1 / (largest * s) for s in stds], [-m / s for m, s in zip(means, stds)]


def check_images(images: Tensor, patch_ids: Tensor, patch_size: int) -> None:
    """Raise TypeError or ValueError unless `images` can be divided into patches and `patch_ids` are int32 or int64."""
    check_tensor("images", images)
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected [B, C, H, W]")
    channels, height, width = images.shape[1:]
    if not channels:
        raise ValueError("images has 0 channels, expected 1 or more")
    check_patch_size(patch_size)
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be divided into patches of {patch_size} x {patch_size}"
        )
    check_index("patch_ids", patch_ids, (...,), images)
    if images.dtype not in DTYPES and images.dtype not in LARGEST:
        raise TypeError(f"images must be uint8, uint16 or floating-point with 16, 32 or 64 bits, not {images.dtype}")


def check_patch_ids(
    op: str, images: Tensor, patch_ids: Tensor, patch_size: int, impl: str, row_weight: Tensor | None = None
) -> None:
    """Check the range of `patch_ids` [M] if `checked` returns True. With row weights [M] and M3AE_KERNELS_CHECK=1, also
    check that the ids of rows whose weight is not 0 are distinct. This function is called inside an op; see ids.py.

    Raises:
        IndexError: an id is out of range, or occurs twice.
    """
    if checked(patch_ids, impl):
        check_range(op, "patch_ids", patch_ids, count_patches(images, patch_size))
    if row_weight is not None and checks_enabled():
        check_distinct(op, "patch_ids", torch.where(row_weight == 0, -1, patch_ids))


def check_patch_size(patch_size: int) -> None:
    """Raise TypeError or ValueError unless `patch_size` is a positive integer."""
    if not is_integer(patch_size):
        raise TypeError(f"patch_size is {patch_size!r}, but must be an integer: patches are square")
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}, but must be at least 1")


def normalisation_for(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Return mean and std for integer images, and (None, None) for floating-point images, which are already normalised.

    Raises:
        TypeError: images is not a dense tensor.
    """
    check_tensor("images", images)
    return (None, None) if images.is_floating_point() else (mean, std)


def per_channel(values: Any, channels: int) -> list[float] | None:
    """Return one number per channel from a sequence, array or tensor; None if `values` does not contain one number per
    channel."""
    if hasattr(values, "flatten"):
        values = values.flatten().tolist()
    if not isinstance(values, Sequence) or len(values) != channels:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None


def count_patches(images: Tensor, patch_size: int) -> int:
    """Return the total number of patches in images [B, C, H, W]."""
    return images[:, 0].numel() // patch_size**2


def planar(images: Tensor) -> bool:
    """Return whether patches of these images have the order (channel, row, column)."""
    return images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last)


def to_cut(weight: Tensor, images: Tensor, patch_size: int, dim: int) -> Tensor:
    """Return the weight, contiguous, with the K elements of `dim` permuted from (row, column, channel) to the patch
    order of `images`."""
    if planar(images) and images.shape[1] > 1:
        weight = weight.unflatten(dim, (patch_size**2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return weight.contiguous()


def from_cut(weight: Tensor, images: Tensor, patch_size: int, dim: int) -> Tensor:
    """Return the weight with the permutation of `to_cut` reversed."""
    if planar(images) and images.shape[1] > 1:
        weight = weight.unflatten(dim, (-1, patch_size**2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return weight


@lru_cache(maxsize=32)
def _per_element(
    values: tuple[float, ...], size: int, planar: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    by_channel = torch.tensor(values, dtype=dtype, device="cpu")
    return (by_channel.repeat_interleave(size) if planar else by_channel.repeat(size)).to(device)


def take_patches(
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Return the patches `patch_ids` [N] int of images [B, C, H, W], as [N, K] of `dtype`. The values are pixel * scale
    + shift, or the pixels themselves if `scale` is empty. With `channels_last`, the order within patches is (row,
    column, channel), regardless of the memory layout of the images."""
    channels = images.shape[1]
    if not len(patch_ids):
        return images.new_empty(0, channels * patch_size**2, dtype=dtype)
    grid_w, grid_h = images.shape[3] // patch_size, images.shape[2] // patch_size
    by_channel = planar(images)
    # With channels innermost, a line of pixels is equivalent to a line of a single, wider channel.
    images = images.contiguous() if by_channel else images.permute(0, 2, 3, 1).flatten(2)[:, None]
    blocks = (
        images.view(widest(images, images.shape[3] // grid_w))
        .unflatten(3, (grid_w, -1))
        .unflatten(2, (grid_h, patch_size))
    )
    ids = patch_ids.long()
    image, patch = ids // (grid_h * grid_w), ids % (grid_h * grid_w)
    lines = blocks.permute(0, 2, 4, 1, 3, 5)[image, patch // grid_w, patch % grid_w]
    lines = lines.view(images.dtype)
    if channels_last and by_channel:
        lines, by_channel = torch.stack(lines.flatten(2).unbind(1), 2), False
    rows_NK = lines.flatten(1).to(dtype)
    if not scale:
        return rows_NK
    scale_K, shift_K = (
        _per_element(tuple(values), patch_size**2, by_channel, dtype, images.device) for values in (scale, shift)
    )
    return torch.addcmul(shift_K, rows_NK, scale_K, out=rows_NK)


def put_patches(rows: Tensor, images: Tensor, patch_size: int, scale: Sequence[float]) -> Tensor:
    """Return contiguous images [B, C, H, W], assembled from all of their patches. `rows` [B * patches, K] contains the
    patches, in the patch order of `images`. Each channel is multiplied by its scale."""
    batch, channels, height, width = images.shape
    grid, patch = (batch, height // patch_size, width // patch_size), (patch_size, patch_size)
    if planar(images):
        blocks = rows.view(*grid, channels, *patch).permute(0, 3, 1, 4, 2, 5)
    else:
        blocks = rows.view(*grid, *patch, channels).permute(0, 5, 1, 3, 2, 4)
    whole = blocks.reshape(images.shape)
    if not scale:
        return whole
    return whole * _per_element(tuple(scale), 1, True, whole.dtype, whole.device)[:, None, None]


def standardise(target: Tensor) -> Tensor:
    """Return rows [N, K] normalised to mean 0 and variance 1 (He et al., arXiv 2111.06377, section 3), with unbiased
    variance and eps 1e-6 as in the code of MAE."""
    var, mean = torch.var_mean(target, dim=1, keepdim=True)
    return (target - mean) * (var + NORM_PIX_EPS).rsqrt()
