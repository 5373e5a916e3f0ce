"""The pixel loss of a masked autoencoder, including the head. Predictions and targets are computed one chunk at a time.

Shapes: M rows, D width, B images, C channels, H x W pixels, P patch size, K = P * P * C.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .dispatch import (
    accumulator,
    as_rows,
    choose_impl,
    compute_dtype,
    wants_grad,
    with_lead,
)
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
from .pixels import (
    check_patch_ids,
    check_patch_size,
    check_pixels,
    from_cut,
    normalisation_for,
    standardise,
    take_patches,
    to_cut,
)
from .plain import check_plain
from .registry import Op

CHUNK_ROWS = 1024  # rows per chunk of the torch implementation

# the arguments that determine the targets: images, patch_ids, patch_size, scale, shift, norm_pix
Target = tuple[Tensor, Tensor, int, Sequence[float], Sequence[float], bool]


def masked_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_pix: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Return the mean over rows r of row_weight[r] * mean_k (hidden[r] @ weight.T + bias - target[r])[k] ** 2.

    Args:
        hidden: [..., D] floating-point.
        weight: [P * P * C, D] floating-point, with rows in the order (row, column, channel).
        images: [B, C, H, W], contiguous or channels_last (otherwise a copy is made). uint8 images are normalised as (x
            / 255 - mean) / std, uint16 images as (x / 65535 - mean) / std, and floating-point images as (x - mean) /
            std, or not at all if mean and std are None. Images that require a gradient are rejected, because none is
            computed for them.
        patch_ids: [...] int32 or int64, the target of each row: image * patches_per_image + patch. The patches of an
            image are numbered in row-major order. `flat_ids` converts ids that are numbered per image. Equal ids give
            correct results. However, they are usually a mistake, so they are rejected with M3AE_KERNELS_CHECK=1. Rows
            of weight 0 are exempt from this check, unless the reduction is "none".
        bias: [P * P * C] floating-point, or None for no bias.
        row_weight: [...] floating-point, or None for ones.
        patch_size: P.
        mean, std: one number per channel. For integer images, they are fractions of the largest value, 255 or 65535.
            For floating-point images, they are in the units of the images, and may be None.
        norm_pix: whether to standardise each target patch, with unbiased variance and eps 1e-6 (He et al., arXiv
            2111.06377, section 3; variance and eps as in their code).
        reduction: "mean" (the sum divided by the sum of the row weights; 0 without rows), "sum" or "none" (the terms of
            the sum, [...]).
        impl: "auto", "triton" or "torch".

    Returns:
        The loss in float32 (float64 for float64 hidden), a scalar, or [...] with reduction "none". The matmuls run in
            autocast's dtype if autocast is enabled, otherwise in the dtype of hidden. Gradients are computed for
            hidden, weight, bias and row_weight, but not for images. The required gradients of hidden, weight and bias
            are computed in the forward pass. With "none", they are computed in the backward pass, which repeats the
            matmuls.

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong.
        IndexError: an id is out of range (checked by torch's implementation on a CPU, and everywhere with
            M3AE_KERNELS_CHECK=1), or occurs twice (checked only with M3AE_KERNELS_CHECK=1).
    """
    scale, shift = check_pixels(images, patch_ids, patch_size, mean, std)
    if wants_grad(images):
        raise ValueError("images require a gradient, which masked_pixel_loss does not compute: pass images.detach()")
    if norm_pix and patch_size**2 * images.shape[1] == 1:
        raise ValueError("norm_pix needs patches with at least two values, because a single value has no variance")
    lead = patch_ids.shape
    check_head(hidden, weight, bias, row_weight, lead, patch_size**2 * images.shape[1], images)
    row_weight = None if row_weight is None else as_rows(row_weight, 0)
    check_reduction(reduction)
    hidden, patch_ids = as_rows(hidden, 1), as_rows(patch_ids, 0)
    dtype = compute_dtype(hidden, weight)
    impl = choose_impl(impl, hidden.device, dtype)
    target = (images, patch_ids, patch_size, scale, shift, norm_pix, dtype)
    if reduction == "none":
        row_loss = pixel_rows_op(hidden, weight, bias, *target, impl)
        return with_lead(row_loss if row_weight is None else row_loss * row_weight.to(row_loss.dtype), lead)
    weight_M = row_weights(row_weight, None, hidden, accumulator(dtype), reduction)
    needs = [wants_grad(hidden), wants_grad(weight), wants_grad(bias)]
    return pixel_loss_op(hidden, weight, bias, weight_M, *target, needs, impl)[0]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    norm_pix: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `squared_loss`."""
    check_patch_ids("masked_pixel_loss", images, patch_ids, patch_size, impl, row_weight)
    if impl == "triton":
        from .triton_impl.pixel_loss import pixel_loss
    else:
        pixel_loss = _pixel_loss
    target = (images, patch_ids, patch_size, scale, shift, norm_pix)
    return squared_loss(hidden, weight, bias, row_weight, dtype, needs, partial(pixel_loss, target=target))


def _fake(
    hidden, weight, bias, row_weight, images, patch_ids, patch_size, scale, shift, norm_pix, dtype, needs, impl
):  # fmt: skip
    row_loss = torch.empty_like(row_weight)
    grads = empty_gradients(hidden, weight, dtype, needs)
    return row_loss.new_empty(()), row_loss, row_loss.new_empty(()), *grads


def _rows_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    norm_pix: bool,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """Return the row losses [M] without computing gradients."""
    ones_M = hidden.new_ones(len(hidden), dtype=accumulator(dtype))
    target = (images, patch_ids, patch_size, scale, shift, norm_pix, dtype)
    return _forward(hidden, weight, bias, ones_M, *target, [False] * 3, impl)[1]


def _rows_fake(hidden, weight, bias, images, patch_ids, patch_size, scale, shift, norm_pix, dtype, impl):
    return hidden.new_empty(hidden.shape[0], dtype=accumulator(dtype))


def _backward(ctx, upstream, *_):
    return scale_gradients(ctx, upstream, 13)


pixel_loss_op = Op("pixel_loss", _forward, _fake, save_gradients, _backward)
pixel_rows_op = Op("pixel_rows", _rows_forward, _rows_fake, save_inputs, rows_backward(pixel_loss_op))


def _pixel_loss(
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
    target: Target,
) -> None:
    """Fill row_loss [M] and the gradients selected by `needs`. hidden, weight and bias must have the same dtype."""
    images, patch_ids, patch_size, scale, shift, norm_pix = target

    def targets(rows: slice) -> Tensor:
        cut_MK = take_patches(images, patch_ids[rows], patch_size, scale, shift, unit_weight.dtype)
        return standardise(cut_MK) if norm_pix else cut_MK

    weight, bias = to_cut(weight, images, patch_size, 0), to_cut(bias, images, patch_size, 0)
    of_weight_KD, of_bias_K = squared_errors(
        hidden, weight, bias, unit_weight, targets, CHUNK_ROWS, needs, row_loss, grad_hidden
    )
    if needs[1]:
        grad_weight.copy_(from_cut(of_weight_KD, images, patch_size, 0))
    if needs[2]:
        grad_bias.copy_(from_cut(of_bias_K, images, patch_size, 0))


class MaskedPixelLoss(LossHead):
    """A module that computes `masked_pixel_loss` with its own head: weight [P * P * channels, dim] (Xavier uniform)
    and, unless `bias` is False, bias [P * P * channels] (zero). `mean` and `std` normalise integer images, and are
    required for them; floating-point images are used unchanged. `predict` returns patches that are normalised like the
    targets. The constructor raises TypeError or ValueError if the patch size or the reduction is wrong."""

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        channels: int = 3,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm_pix: bool = False,
        reduction: str = "mean",
        impl: str = "auto",
    ):
        check_patch_size(patch_size)
        check_reduction(reduction)
        super().__init__(dim, patch_size**2 * channels, bias)
        self.patch_size, self.mean, self.std, self.norm_pix = patch_size, mean, std, norm_pix
        self.reduction, self.impl = reduction, impl

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, patch_size: int, **options) -> "MaskedPixelLoss":
        """Return a loss module that shares the parameters of a head such as ViT-MAE's `decoder_pred`. `options` are
        further arguments of the constructor.

        Raises:
            TypeError, ValueError: the module is not a `torch.nn.Linear`, computes more than this class, such as an
                adapter, or does not predict whole patches.
        """
        check_plain("head", linear, nn.Linear)
        check_patch_size(patch_size)
        channels, rest = divmod(linear.out_features, patch_size**2)
        if rest:
            raise ValueError(
                f"{linear} does not predict patches of {patch_size} x {patch_size} pixels: out_features must be a "
                f"multiple of {patch_size**2}"
            )
        with torch.device("meta"):
            head = cls(linear.in_features, patch_size=patch_size, channels=channels, **options)
        for name in ("weight", "bias"):
            setattr(head, name, getattr(linear, name))
        return head

    def forward(self, hidden: Tensor, images: Tensor, patch_ids: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar or (with reduction "none") [...], of the predictions from hidden [..., dim]. The
        targets are the patches patch_ids [...] int of images [B, C, H, W]; row_weight is [...] floating-point, or None
        for ones. Images are uint8, uint16, or floating-point and already normalised."""
        mean, std = normalisation_for(images, self.mean, self.std)
        return masked_pixel_loss(
            hidden,
            self.weight,
            images,
            patch_ids,
            bias=self.bias,
            row_weight=row_weight,
            patch_size=self.patch_size,
            mean=mean,
            std=std,
            norm_pix=self.norm_pix,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        dim, bias = self.weight.shape[1], self.bias is not None
        return f"dim={dim}, patch_size={self.patch_size}, bias={bias}, norm_pix={self.norm_pix}"
