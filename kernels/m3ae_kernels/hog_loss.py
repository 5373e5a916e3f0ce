"""The HOG loss of a masked autoencoder, including the head, and the targets of this loss. hog.py describes the targets.

Shapes: M rows, D width, B images, C channels, H x W pixels, P patch size.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .dispatch import accumulator, as_rows, check_tensor, choose_impl, compute_dtype, wants_grad, with_lead
from .hog import ORIENTATIONS, fill_targets
from .loss import (
    LossHead,
    check_head,
    check_reduction,
    empty_gradients,
    row_weights,
    rows_backward,
    save_gradients,
    save_inputs,
    scale_gradients,
    squared_errors,
    squared_loss,
)
from .pixels import LARGEST, check_images, check_patch_ids, check_patch_size, per_channel
from .registry import Op


def hog_targets(
    images: Tensor, patch_ids: Tensor, *, patch_size: int, std: Sequence[float] | None = None, impl: str = "auto"
) -> Tensor:
    """Return the targets of `masked_hog_loss`, [..., 9] in float32 (float64 for float64 images).

    Args:
        images, patch_ids, patch_size, std, impl: as in `masked_hog_loss`.

    Raises:
        TypeError, ValueError, IndexError: as in `masked_hog_loss`, except that equal ids are always accepted.
    """
    scale = check_hog("hog_targets", images, patch_ids, patch_size, std)
    dtype = accumulator(images.dtype)
    impl = choose_impl(impl, images.device, dtype)
    ids = as_rows(patch_ids, 0)
    return with_lead(hog_targets_op(images, ids, patch_size, scale, dtype, impl), patch_ids.shape)


def check_hog(op: str, images: Tensor, patch_ids: Tensor, patch_size: int, std: Sequence[float] | None) -> list[float]:
    """Check the image arguments, and return the weight of each channel in the grey image, which is a weighted sum of
    the channels.

    Raises:
        TypeError, ValueError: the named argument is wrong.
    """
    check_images(images, patch_ids, patch_size)
    if wants_grad(images):
        raise ValueError(f"images require a gradient, which {op} does not compute: pass images.detach()")
    channels = images.shape[1]
    if std is None:
        return [1 / (LARGEST.get(images.dtype, 1) * channels)] * channels
    if not images.is_floating_point():
        raise ValueError(f"std is for floating-point images, but the images are {images.dtype}")
    stds = per_channel(std, channels)
    if stds is None or not all(0 < value < math.inf for value in stds):
        raise ValueError(f"std must be a positive, finite number for each of the {channels} channels, got {std}")
    return [value / channels for value in stds]


def find_targets(
    images: Tensor, patch_ids: Tensor, patch_size: int, scale: Sequence[float], dtype: torch.dtype, impl: str
) -> Tensor:
    """Return the targets of the patches `patch_ids` [M] of images [B, C, H, W], [M, 9] of `dtype`."""
    out = images.new_empty(len(patch_ids), ORIENTATIONS, dtype=dtype)
    if not len(patch_ids):
        return out
    if impl == "triton":
        from .triton_impl.hog import fill_targets as fill
    else:
        fill = fill_targets
    fill(images, patch_ids, patch_size, scale, out)
    return out


def _targets_forward(
    images: Tensor, patch_ids: Tensor, patch_size: int, scale: Sequence[float], dtype: torch.dtype, impl: str
) -> Tensor:
    check_patch_ids("hog_targets", images, patch_ids, patch_size, impl)
    return find_targets(images, patch_ids, patch_size, scale, dtype, impl)


def _targets_fake(images, patch_ids, patch_size, scale, dtype, impl):
    return images.new_empty(patch_ids.shape[0], ORIENTATIONS, dtype=dtype)


hog_targets_op = Op("hog_targets", _targets_forward, _targets_fake)


def masked_hog_loss(
    hidden: Tensor,
    weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    patch_size: int,
    std: Sequence[float] | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Return the mean over rows r of row_weight[r] * mean_k (hidden[r] @ weight.T + bias - target[r])[k] ** 2. The
    target of a row is the histogram of the oriented gradients of its patch.

    Args:
        hidden: [..., D] floating-point.
        weight: [9, D] floating-point.
        images: [B, C, H, W], contiguous or channels_last. uint8 and uint16 images have the values 0 to 255 and 0 to
            65535; in floating-point images, black is 0 and white is 1, unless `std` is given. Images that require a
            gradient are rejected, because none is computed for them.
        patch_ids: [...] int32 or int64, the patch that each row predicts, numbered as in `masked_pixel_loss`.
        bias: [9] floating-point, or None for no bias.
        row_weight: [...] floating-point, or None for ones.
        patch_size: P, the side of a patch and of a cell.
        std: one number per channel: the standard deviations by which floating-point images were divided. None for
            other images.
        reduction: as in `masked_pixel_loss`.
        impl: "auto", "triton" or "torch".

    Returns:
        The loss in float32 (float64 for float64 hidden), a scalar, or [...] with reduction "none"; see
            `masked_pixel_loss` for the dtypes of the matmuls and for the gradients.

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong.
        IndexError: as in `masked_pixel_loss`.
    """
    scale = check_hog("masked_hog_loss", images, patch_ids, patch_size, std)
    lead = patch_ids.shape
    check_head(hidden, weight, bias, row_weight, lead, ORIENTATIONS, images)
    row_weight = None if row_weight is None else as_rows(row_weight, 0)
    check_reduction(reduction)
    hidden, patch_ids = as_rows(hidden, 1), as_rows(patch_ids, 0)
    dtype = compute_dtype(hidden, weight)
    impl = choose_impl(impl, hidden.device, dtype)
    target = (images, patch_ids, patch_size, scale, dtype)
    if reduction == "none":
        row_loss = hog_rows_op(hidden, weight, bias, *target, impl)
        return with_lead(row_loss if row_weight is None else row_loss * row_weight.to(row_loss.dtype), lead)
    weight_M = row_weights(row_weight, None, hidden, accumulator(dtype), reduction)
    needs = [wants_grad(hidden), wants_grad(weight), wants_grad(bias)]
    return hog_loss_op(hidden, weight, bias, weight_M, *target, needs, impl)[0]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    dtype: torch.dtype,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `squared_loss`."""
    check_patch_ids("masked_hog_loss", images, patch_ids, patch_size, impl, row_weight)
    targets_MK = find_targets(images, patch_ids, patch_size, scale, row_weight.dtype, impl)
    return squared_loss(hidden, weight, bias, row_weight, dtype, needs, partial(_hog_loss, targets=targets_MK))


def _fake(hidden, weight, bias, row_weight, images, patch_ids, patch_size, scale, dtype, needs, impl):
    row_loss = torch.empty_like(row_weight)
    return row_loss.new_empty(()), row_loss, row_loss.new_empty(()), *empty_gradients(hidden, weight, dtype, needs)


def _rows_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """Return the row losses [M] without computing gradients."""
    ones_M = hidden.new_ones(len(hidden), dtype=accumulator(dtype))
    target = (images, patch_ids, patch_size, scale, dtype)
    return _forward(hidden, weight, bias, ones_M, *target, [False] * 3, impl)[1]


def _rows_fake(hidden, weight, bias, images, patch_ids, patch_size, scale, dtype, impl):
    return hidden.new_empty(hidden.shape[0], dtype=accumulator(dtype))


def _backward(ctx, upstream, *_):
    return scale_gradients(ctx, upstream, 11)


hog_loss_op = Op("hog_loss", _forward, _fake, save_gradients, _backward)
hog_rows_op = Op("hog_rows", _rows_forward, _rows_fake, save_inputs, rows_backward(hog_loss_op))


def _hog_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    unit_weight: Tensor,
    needs: Sequence[bool],
    row_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    *,
    targets: Tensor,
) -> None:
    """Fill row_loss [M] and the gradients selected by `needs`. hidden, weight and bias must have the same dtype. All
    rows are processed at once, because predictions and targets [M, 9] are far smaller than hidden. `targets` is
    overwritten."""
    of_weight, of_bias = squared_errors(
        hidden, weight, bias, unit_weight, targets.__getitem__, len(hidden), needs, row_loss, grad_hidden
    )
    if needs[1]:
        grad_weight.copy_(of_weight)
    if needs[2]:
        grad_bias.copy_(of_bias)


class MaskedHogLoss(LossHead):
    """A module that computes `masked_hog_loss` with its own head: weight [9, dim] (Xavier uniform) and, unless `bias`
    is False, bias [9] (zero). `std` is used for floating-point images only. The constructor raises TypeError or
    ValueError if the patch size or the reduction is wrong."""

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        bias: bool = True,
        std: Sequence[float] | None = None,
        reduction: str = "mean",
        impl: str = "auto",
    ):
        check_patch_size(patch_size)
        check_reduction(reduction)
        super().__init__(dim, ORIENTATIONS, bias)
        self.patch_size, self.std, self.reduction, self.impl = patch_size, std, reduction, impl

    def forward(self, hidden: Tensor, images: Tensor, patch_ids: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar or (with reduction "none") [...], of the predictions from hidden [..., dim]. The
        targets are those of the patches patch_ids [...] int of images [B, C, H, W]; row_weight is [...] floating-point,
        or None for ones."""
        check_tensor("images", images)
        return masked_hog_loss(
            hidden,
            self.weight,
            images,
            patch_ids,
            bias=self.bias,
            row_weight=row_weight,
            patch_size=self.patch_size,
            std=self.std if images.is_floating_point() else None,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, patch_size={self.patch_size}, bias={self.bias is not None}"
