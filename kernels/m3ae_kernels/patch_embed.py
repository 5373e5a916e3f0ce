"""Patch embedding directly from images: extraction of patches, normalisation and matmul in one op.

Shapes: B images, C channels, H x W pixels, P patch size, K = P * P * C, N rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .dispatch import (
    accumulator,
    as_rows,
    check_float,
    choose_impl,
    compute_dtype,
    no_autocast,
    wants_grad,
    with_lead,
)
from .ids import check_distinct, check_range, checked, checks_enabled, without_padding
from .pixels import check_patch_size, check_pixels, count_patches, normalisation_for, put_patches, take_patches, to_cut
from .plain import check_plain
from .registry import Op
from .segment_sum import segment_sum

CHUNK_ROWS = 4096  # rows per chunk, which limits the float32 patches that the torch implementation keeps at once


def patch_embed(
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return embeddings of selected patches of a batch of images: one row normalised_patch @ weight.T + bias per id.

    Args:
        images: [B, C, H, W], contiguous or channels_last (otherwise a copy is made). uint8 images are normalised as (x
            / 255 - mean) / std, uint16 images as (x / 65535 - mean) / std, and floating-point images as (x - mean) /
            std, or not at all if mean and std are None.
        patch_ids: [...] int32 or int64, image * patches_per_image + patch. The patches of an image are numbered in
            row-major order. `flat_ids` converts ids that are numbered per image. Ids may be equal.
        weight: [D, P * P * C] floating-point, in the order (row, column, channel).
        bias: [D] floating-point, or None for no bias.
        patch_size: P; H and W are multiples of it.
        mean, std: one number per channel. For integer images, they are fractions of the largest value, 255 or 65535.
            For floating-point images, they are in the units of the images, and may be None.
        impl: "auto", "triton" or "torch".

    Returns:
        [..., D] in the dtype of the matmul: autocast's dtype if autocast is enabled (as in torch's Linear), otherwise
            the dtype of the images if they are floating-point, otherwise the dtype of the weight. Gradients are
            computed for weight, bias, and floating-point images. For the gradient of the weight, the Triton
            implementation extracts the patches again in the backward pass; the torch implementation keeps them, [N, K].

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong.
        IndexError: an id is out of range (checked by torch's implementation on a CPU, and everywhere with
            M3AE_KERNELS_CHECK=1), or ids seem to be numbered per image (checked only with M3AE_KERNELS_CHECK=1): the
            batch has several images, but all ids are of the first image, and an id occurs twice.
    """
    scale, shift = check_pixels(images, patch_ids, patch_size, mean, std)
    check_float("weight", weight, (None, patch_size**2 * images.shape[1]), images)
    if bias is not None:
        check_float("bias", bias, (weight.shape[0],), images)
    dtype = compute_dtype(images, weight)
    impl = choose_impl(impl, images.device, dtype)
    keep = impl == "torch" and wants_grad(weight)
    ids = as_rows(patch_ids, 0)
    out_ND, _ = patch_embed_op(images, ids, weight, bias, patch_size, scale, shift, dtype, keep, impl)
    return with_lead(out_ND, patch_ids.shape)


def _forward(
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the embeddings and, with `keep`, the patches [N, K]. Only the torch implementation supports `keep`."""
    if checked(patch_ids, impl):
        check_range("patch_embed", "patch_ids", patch_ids, count_patches(images, patch_size))
    if checks_enabled() and len(images) > 1 and (patch_ids < count_patches(images, patch_size) // len(images)).all():
        check_distinct("patch_embed", "patch_ids", without_padding(patch_ids))
    out_ND, kept_NK = _fake(images, patch_ids, weight, bias, patch_size, scale, shift, dtype, keep, impl)
    bias_D = weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
    if impl == "triton":
        from .triton_impl.patch_embed import patch_embed

        patch_embed(images, patch_ids, weight, bias_D, patch_size, scale, shift, out_ND)
        return out_ND, kept_NK
    acc = accumulator(dtype)
    weight_KD = weight.to(dtype).t()
    with no_autocast(images):
        for first in range(0, len(patch_ids), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            patches_NK = take_patches(images, patch_ids[rows], patch_size, scale, shift, acc, channels_last=True)
            patches_NK = kept_NK[rows].copy_(patches_NK) if keep else patches_NK.to(dtype)
            torch.addmm(bias_D, patches_NK, weight_KD, out=out_ND[rows])
    return out_ND, kept_NK


def _fake(images, patch_ids, weight, bias, patch_size, scale, shift, dtype, keep, impl):
    rows = patch_ids.shape[0]
    out = images.new_empty(rows, weight.shape[0], dtype=dtype)
    return out, images.new_empty((rows, weight.shape[1]) if keep else 0, dtype=dtype)


def _setup_context(ctx, inputs, output):
    images, patch_ids, weight, bias, ctx.patch_size, ctx.scale, ctx.shift, _, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    # The weight is saved only for the gradient of the images: the gradients of weight and bias do not depend on it.
    ctx.save_for_backward(images, patch_ids, output[1], weight if ctx.needs_input_grad[0] else None)
    ctx.dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype


def _backward(ctx, grad, _):
    needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4]
    options = ctx.patch_size, ctx.scale, ctx.shift, needs, *ctx.dtypes, ctx.impl
    grads = patch_embed_backward_op(grad, *ctx.saved_tensors, *options)
    grad_images, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs))
    return grad_images, None, grad_weight, grad_bias, *[None] * 6


def _gradients(
    grad: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    patches: Tensor,
    weight: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    needs: Sequence[bool],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of images, weight and bias. Gradients that `needs` does not select are empty tensors."""
    dtype = grad.dtype
    grad_images, grad_weight, grad_bias = _empty_gradients(
        grad, images, patch_ids, patches, weight, patch_size, scale, shift, needs, weight_dtype, bias_dtype, impl
    )
    with no_autocast(images):
        if needs[1] and impl == "triton":
            from .triton_impl.patch_embed import patch_embed_dweight

            patch_embed_dweight(grad, images, patch_ids, patch_size, scale, shift, grad_weight)
        elif needs[1] and len(grad) <= CHUNK_ROWS:
            grad_weight = (grad.t() @ patches).to(weight_dtype)
        elif needs[1]:
            sum_DK = torch.zeros_like(grad_weight, dtype=accumulator(dtype))
            for grad_ND, patches_NK in zip(grad.split(CHUNK_ROWS), patches.split(CHUNK_ROWS)):
                sum_DK += grad_ND.t() @ patches_NK
            grad_weight.copy_(sum_DK)
        if needs[2]:
            grad_bias = grad.sum(0) if bias_dtype == dtype else grad.sum(0, dtype=bias_dtype)
        if weight is not None:
            rows = grad @ to_cut(weight.to(dtype), images, patch_size, 1)
            rows = segment_sum(rows, patch_ids, count_patches(images, patch_size), images.dtype, impl)
            grad_images = put_patches(rows, images, patch_size, scale)
    return grad_images, grad_weight, grad_bias


def _empty_gradients(
    grad, images, patch_ids, patches, weight, patch_size, scale, shift, needs, weight_dtype, bias_dtype, impl
):  # fmt: skip
    dim, size = grad.shape[1], patch_size**2 * images.shape[1]
    return (
        images.new_empty(images.shape if needs[0] else 0),
        grad.new_empty((dim, size) if needs[1] else 0, dtype=weight_dtype),
        grad.new_empty(dim if needs[2] else 0, dtype=bias_dtype),
    )


patch_embed_op = Op("patch_embed", _forward, _fake, _setup_context, _backward)
patch_embed_backward_op = Op("patch_embed_backward", _gradients, _empty_gradients)


class PatchEmbed(nn.Module):
    """A module that applies `patch_embed` with its own weight [dim, P * P * channels] (Xavier uniform) and, unless
    `bias` is False, bias [dim] (zero), as in M3AE. `mean` and `std` normalise integer images, and are required for
    them; floating-point images are used unchanged."""

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        channels: int = 3,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        check_patch_size(patch_size)
        self.patch_size, self.mean, self.std, self.impl = patch_size, mean, std, impl
        self.weight = nn.Parameter(torch.empty(dim, patch_size**2 * channels))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        impl: str = "auto",
    ) -> "PatchEmbed":
        """Return the module that is equivalent to a convolution of patches, such as timm's `patch_embed.proj`, or
        `embeddings.patch_embeddings.projection` in Hugging Face's ViT and ViT-MAE. The weights are copied; mean and std
        are used for integer images.

        Raises:
            TypeError, ValueError: the module is not a `torch.nn.Conv2d`, computes more than this class, such as timm's
                StdConv2d, or does not embed square patches.
        """
        check_plain("embedding", conv, nn.Conv2d)
        size = conv.kernel_size[0]
        if (conv.kernel_size, conv.stride, conv.dilation) != ((size, size), (size, size), (1, 1)) or conv.groups != 1:
            raise ValueError(
                f"{conv} does not embed patches: kernel and stride must be square and equal, and dilation "
                "and groups must be 1"
            )
        if conv.padding not in ((0, 0), "valid"):
            raise ValueError(f"{conv} has padding, but patches must not be padded")
        embed = cls(
            conv.out_channels, patch_size=size, channels=conv.in_channels, bias=conv.bias is not None,
            mean=mean, std=std, impl=impl,
        ).to(conv.weight)  # fmt: skip
        with torch.no_grad():
            embed.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
            if embed.bias is not None and conv.bias is not None:
                embed.bias.copy_(conv.bias)
        for own, other in zip(embed.parameters(), conv.parameters()):
            own.requires_grad_(other.requires_grad)
        return embed

    def to_conv(self) -> nn.Conv2d:
        """Return the equivalent convolution, for floating-point images that are already normalised."""
        channels = self.weight.shape[1] // self.patch_size**2
        conv = nn.Conv2d(
            channels, len(self.weight), self.patch_size, self.patch_size, bias=self.bias is not None,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.weight.view(-1, self.patch_size, self.patch_size, channels).permute(0, 3, 1, 2))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        for own, other in zip(conv.parameters(), self.parameters()):
            own.requires_grad_(other.requires_grad)
        return conv

    def reset_parameters(self) -> None:
        """Initialise the weight (Xavier uniform) and the bias (zero) again."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, images: Tensor, patch_ids: Tensor) -> Tensor:
        """Return the embeddings [..., dim] of the patches patch_ids [...] int of images [B, C, H, W]. Images are uint8,
        uint16, or floating-point and already normalised."""
        mean, std = normalisation_for(images, self.mean, self.std)
        return patch_embed(
            images,
            patch_ids,
            self.weight,
            self.bias,
            patch_size=self.patch_size,
            mean=mean,
            std=std,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        dim, bias = self.weight.shape[0], self.bias is not None
        return f"dim={dim}, patch_size={self.patch_size}, bias={bias}, mean={self.mean}, std={self.std}"
