"""The pixel loss of a masked autoencoder, head included: predictions and targets exist one chunk at a time.

Shapes: M rows, D width, B images, C channels, H x W pixels, P patch size, K = P * P * C.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import accumulator, check_float, choose_impl, compute_dtype, no_autocast, wants_grad
from .loss import room_for_grads, save_grads, scale_grads, unit_weights
from .pixels import check_pixels, from_planar, standardise, take_patches, to_planar

CHUNK_ROWS = 1024  # of the torch implementation


def masked_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    row_weight: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    norm_pix: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Sum over rows r of row_weight[r] * mean_k (hidden[r] @ weight.T + bias - target[r])[k] ** 2.

    Args:
        hidden: [M, D] floating.
        weight: [P * P * C, D].
        bias: [P * P * C].
        images: [B, C, H, W], C from 1 to 4; uint8, normalised as (x / 255 - mean) / std, or floating, taken as it is.
        patch_ids: [M] int32, the target of each row: image * patches_per_image + patch, patches in row-major order.
        row_weight: [M] floating; carries every normalisation.
        patch_size: P.
        mean, std: a number a channel in units of [0, 1] pixels for uint8 images, None for floating ones.
        norm_pix: standardise each target patch: unbiased variance, eps 1e-6 (He et al., arXiv 2111.06377, section 4.1).
        impl: "auto", "triton" or "torch".

    Returns:
        The scalar loss, float32 (float64 for float64 hidden). The matmuls run in autocast's dtype where it is on, else
        in that of hidden. Gradients for hidden, weight, bias and row_weight; the first three are computed in the
        forward pass, where they are wanted. None for images.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    scale, shift = check_pixels(images, patch_ids, patch_size, mean, std)
    check_float("hidden", hidden, (patch_ids.shape[0], None), hidden)
    check_float("weight", weight, (patch_size**2 * images.shape[1], hidden.shape[1]), hidden)
    check_float("bias", bias, (weight.shape[0],), hidden)
    check_float("row_weight", row_weight, (hidden.shape[0],), hidden)
    dtype = compute_dtype(hidden, weight)
    hidden_grad, param_grad = wants_grad(hidden), wants_grad(weight, bias)
    return pixel_loss_op(
        hidden, weight, bias, row_weight, images, patch_ids, patch_size, scale, shift, norm_pix,
        dtype, hidden_grad, param_grad, impl,
    )[0]  # fmt: skip


@torch.library.custom_op("m3ae::pixel_loss", mutates_args=())
def pixel_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    norm_pix: bool,
    dtype: torch.dtype,
    hidden_grad: bool,
    param_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, row losses, unit, and the gradients of hidden, weight and bias divided by unit)."""
    share_M, unit = unit_weights(row_weight, accumulator(dtype))
    row_loss_M = torch.empty_like(share_M)
    grads = room_for_grads(hidden, weight, dtype, hidden_grad, param_grad)
    if choose_impl(impl, hidden.device) == "triton":
        from .triton_impl.pixel_loss import pixel_loss
    else:
        pixel_loss = _pixel_loss
    if not len(hidden):
        for grad in grads:
            grad.zero_()
    else:
        with no_autocast(hidden):
            pixel_loss(
                hidden.to(dtype), weight.to(dtype), bias.to(dtype), share_M, images, patch_ids, patch_size, scale,
                shift, norm_pix, row_loss_M, *grads,
            )  # fmt: skip
    return torch.dot(row_loss_M, row_weight.to(row_loss_M.dtype)), row_loss_M, unit, *grads


@pixel_loss_op.register_fake
def _(
    hidden,
    weight,
    bias,
    row_weight,
    images,
    patch_ids,
    patch_size,
    scale,
    shift,
    norm_pix,
    dtype,
    hidden_grad,
    param_grad,
    impl,
):
    row_loss = row_weight.new_empty(hidden.shape[0], dtype=accumulator(dtype))
    grads = room_for_grads(hidden, weight, dtype, hidden_grad, param_grad)
    return row_loss.new_empty(()), row_loss, row_loss.new_empty(()), *grads


def _pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    share: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    norm_pix: bool,
    row_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Fills row_loss [M], and the gradients that have room; hidden, weight and bias have one dtype."""
    dtype, acc = hidden.dtype, share.dtype
    weight, bias = to_planar(weight, patch_size, 0), to_planar(bias, patch_size, 0)
    sum_KD, sum_K = torch.zeros_like(weight, dtype=acc), torch.zeros_like(bias, dtype=acc)
    for start in range(0, len(hidden), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        error_MK = take_patches(images, patch_ids[rows], patch_size, scale, shift, acc)
        if norm_pix:
            error_MK = standardise(error_MK)
        torch.sub(torch.addmm(bias, hidden[rows], weight.t()), error_MK, out=error_MK)
        row_loss[rows] = torch.linalg.vector_norm(error_MK, dim=1).square_().div_(error_MK.shape[1])
        if not (grad_hidden.numel() or grad_weight.numel()):
            continue
        slope_MK = error_MK.mul_(share[rows, None] * (2 / error_MK.shape[1]))
        slope_low_MK = slope_MK.to(dtype)
        if grad_hidden.numel():
            torch.mm(slope_low_MK, weight, out=grad_hidden[rows])
        if grad_weight.numel():
            sum_KD += slope_low_MK.t() @ hidden[rows]
            sum_K += slope_MK.sum(0)
    if grad_weight.numel():
        grad_weight.copy_(from_planar(sum_KD, patch_size, 0))
        grad_bias.copy_(from_planar(sum_K, patch_size, 0))


def _backward(ctx, upstream, *_):
    return *scale_grads(ctx, upstream), *[None] * 10


pixel_loss_op.register_autograd(_backward, setup_context=save_grads)


class MaskedPixelLoss(nn.Module):
    """`masked_pixel_loss` with the head that it owns: weight [P * P * channels, dim] (Xavier uniform), bias (zero)."""

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        channels: int = 3,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        norm_pix: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.patch_size, self.mean, self.std, self.norm_pix, self.impl = patch_size, mean, std, norm_pix, impl
        self.weight = nn.Parameter(torch.empty(patch_size**2 * channels, dim))
        self.bias = nn.Parameter(torch.empty(patch_size**2 * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, images: Tensor, patch_ids: Tensor, row_weight: Tensor) -> Tensor:
        """hidden [M, dim], images [B, C, H, W], patch_ids [M] int32, row_weight [M] -> scalar."""
        return masked_pixel_loss(
            hidden,
            self.weight,
            self.bias,
            images,
            patch_ids,
            row_weight,
            patch_size=self.patch_size,
            mean=self.mean if images.dtype == torch.uint8 else None,
            std=self.std if images.dtype == torch.uint8 else None,
            norm_pix=self.norm_pix,
            impl=self.impl,
        )

    def predict(self, hidden: Tensor) -> Tensor:
        """The predicted patches [M, P * P * channels] of hidden [M, dim], normalised as the targets are."""
        return F.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, patch_size={self.patch_size}, norm_pix={self.norm_pix}"
