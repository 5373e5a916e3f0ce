"""Patch embedding from the images themselves: cut, normalise, multiply; no patch tensor is stored.

Shapes: B images, C channels, H x W pixels, P patch size, K = P * P * C, N rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .dispatch import accumulator, check_float, choose_impl, compute_dtype, no_autocast
from .pixels import check_pixels, from_planar, put_patches, take_patches, to_planar
from .segment_sum import segment_sum

CHUNK_ROWS = 4096  # bounds the patches that the torch implementation holds at once


def patch_embed(
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    impl: str = "auto",
) -> Tensor:
    """Embeds the chosen patches of a batch of images: rows of (patch * scale + shift) @ weight.T + bias.

    Args:
        images: [B, C, H, W], C from 1 to 4; uint8, normalised as (x / 255 - mean) / std, or floating, taken as it is.
        patch_ids: [N] int32, image * patches_per_image + patch, patches in row-major order.
        weight: [D, P * P * C] in the order (row, column, channel).
        bias: [D].
        patch_size: P; H and W are multiples of it.
        mean, std: a number a channel in units of [0, 1] pixels for uint8 images, None for floating ones.
        impl: "auto", "triton" or "torch".

    Returns:
        [N, D] in the dtype of the matmul: that of autocast where it is on (as torch's Linear), else that of floating
        images, else that of the weight. Gradients for weight, bias, and floating images; the backward cuts the patches
        again.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    scale, shift = check_pixels(images, patch_ids, patch_size, mean, std)
    check_float("weight", weight, (None, patch_size**2 * images.shape[1]), images)
    check_float("bias", bias, (weight.shape[0],), images)
    dtype = compute_dtype(images, weight)
    return patch_embed_op(images, patch_ids, weight, bias, patch_size, scale, shift, dtype, impl)


@torch.library.custom_op("m3ae::patch_embed", mutates_args=())
def patch_embed_op(
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    if choose_impl(impl, images.device) == "triton":
        from .triton_impl.patch_embed import patch_embed

        return patch_embed(images, patch_ids, weight, bias, patch_size, scale, shift, dtype)
    acc = accumulator(dtype)
    weight_KD, bias_D = to_planar(weight.to(dtype), patch_size, 1).t(), bias.to(dtype)
    out_ND = images.new_empty(len(patch_ids), weight.shape[0], dtype=dtype)
    with no_autocast(images):
        for ids_N, rows_ND in zip(patch_ids.split(CHUNK_ROWS), out_ND.split(CHUNK_ROWS)):
            patches_NK = take_patches(images, ids_N, patch_size, scale, shift, acc).to(dtype)
            torch.addmm(bias_D, patches_NK, weight_KD, out=rows_ND)
    return out_ND


@patch_embed_op.register_fake
def _(images, patch_ids, weight, bias, patch_size, scale, shift, dtype, impl):
    return images.new_empty(patch_ids.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("m3ae::patch_embed_backward", mutates_args=())
def patch_embed_backward_op(
    grad: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of weight and bias in the accumulator dtype, and of images, empty without a weight."""
    impl = choose_impl(impl, images.device)
    dtype, acc = grad.dtype, accumulator(grad.dtype)
    grad_weight, grad_bias, grad_images = _empty_grads(grad, images, weight, patch_size)
    with no_autocast(images):
        if impl == "triton":
            from .triton_impl.patch_embed import patch_embed_dweight

            patch_embed_dweight(grad, images, patch_ids, patch_size, scale, shift, grad_weight)
        else:
            sum_DK = torch.zeros_like(grad_weight)
            for ids_N, grad_ND in zip(patch_ids.split(CHUNK_ROWS), grad.split(CHUNK_ROWS)):
                patches_NK = take_patches(images, ids_N, patch_size, scale, shift, acc).to(dtype)
                sum_DK += grad_ND.t() @ patches_NK
            grad_weight.copy_(from_planar(sum_DK, patch_size, 1))
        torch.sum(grad, 0, dtype=acc, out=grad_bias)
        if weight is not None:
            count = images[:, 0].numel() // patch_size**2
            rows = segment_sum(grad @ to_planar(weight.to(dtype), patch_size, 1), patch_ids, count, images.dtype, impl)
            grad_images = put_patches(rows, images, patch_size)
    return grad_weight, grad_bias, grad_images


@patch_embed_backward_op.register_fake
def _(grad, images, patch_ids, weight, patch_size, scale, shift, impl):
    return _empty_grads(grad, images, weight, patch_size)


def _empty_grads(grad, images, weight, patch_size):
    grad_weight = grad.new_empty(grad.shape[1], patch_size**2 * images.shape[1], dtype=accumulator(grad.dtype))
    grad_images = images.new_empty((0,) if weight is None else images.shape)
    return grad_weight, grad_weight.new_empty(grad.shape[1]), grad_images


def _setup_context(ctx, inputs, output):
    images, patch_ids, weight, bias, ctx.patch_size, ctx.scale, ctx.shift, _, ctx.impl = inputs
    # The gradients of weight and bias need only the pixels.
    ctx.save_for_backward(images, patch_ids, weight if ctx.needs_input_grad[0] else None)
    ctx.dtypes = weight.dtype, bias.dtype


def _backward(ctx, grad):
    images, patch_ids, weight = ctx.saved_tensors
    grad_weight, grad_bias, grad_images = patch_embed_backward_op(
        grad, images, patch_ids, weight, ctx.patch_size, ctx.scale, ctx.shift, ctx.impl
    )
    weight_dtype, bias_dtype = ctx.dtypes
    grad_images = None if weight is None else grad_images
    return grad_images, None, grad_weight.to(weight_dtype), grad_bias.to(bias_dtype), None, None, None, None, None


patch_embed_op.register_autograd(_backward, setup_context=_setup_context)


class PatchEmbed(nn.Module):
    """`patch_embed` with its weight [dim, P * P * channels] (Xavier uniform) and bias [dim] (zero), as in M3AE."""

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        channels: int = 3,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        impl: str = "auto",
    ):
        super().__init__()
        self.patch_size, self.mean, self.std, self.impl = patch_size, mean, std, impl
        self.weight = nn.Parameter(torch.empty(dim, patch_size**2 * channels))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, images: Tensor, patch_ids: Tensor) -> Tensor:
        """images [B, C, H, W], uint8, or floating and already normalised; patch_ids [N] int32 -> [N, dim]."""
        return patch_embed(
            images,
            patch_ids,
            self.weight,
            self.bias,
            patch_size=self.patch_size,
            mean=self.mean if images.dtype == torch.uint8 else None,
            std=self.std if images.dtype == torch.uint8 else None,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}, patch_size={self.patch_size}, mean={self.mean}, std={self.std}"
