"""Both losses of M3AE in one call, from the packed rows of the decoder.

Shapes: T packed rows, D width, I rows with a pixel loss, W rows with a token loss, V vocabulary, K = P * P * C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .gather import GatherNorm, gather_tokens
from .pixel_loss import MaskedPixelLoss, masked_pixel_loss
from .token_loss import MaskedTokenLoss, masked_token_loss


class M3AELoss(NamedTuple):
    """loss = image + text, scalars; correct [W] bool."""

    loss: Tensor
    image: Tensor
    text: Tensor
    correct: Tensor


def m3ae_loss(
    x: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    image_weight: Tensor,
    image_bias: Tensor,
    text_weight: Tensor,
    text_bias: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    image_row_weight: Tensor,
    targets: Tensor,
    text_row_weight: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    norm_pix: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> M3AELoss:
    """The final LayerNorm on the rows that carry loss, in one pass for both modalities, and then both heads with their
    losses: `gather_tokens`, `masked_pixel_loss` and `masked_token_loss`, where each argument is explained.

    Args:
        x: [T, D] floating, the last block's output.
        image_rows, text_rows: [I], [W] int32; no row twice.
        norm_weight, norm_bias: [D], the final LayerNorm.
        image_weight, image_bias: [K, D], [K]; text_weight, text_bias: [V, D], [V]: the heads.
        images, patch_ids [I], image_row_weight [I]: the pixel loss's targets and weights.
        targets [W], text_row_weight [W]: the token loss's.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    rows = torch.cat((image_rows, text_rows))
    hidden = gather_tokens(x, rows, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, impl=impl)
    image_hidden, text_hidden = hidden.split((image_rows.shape[0], text_rows.shape[0]))
    image = masked_pixel_loss(
        image_hidden,
        image_weight,
        image_bias,
        images,
        patch_ids,
        image_row_weight,
        patch_size=patch_size,
        mean=mean,
        std=std,
        norm_pix=norm_pix,
        impl=impl,
    )
    text, correct = masked_token_loss(
        text_hidden,
        text_weight,
        text_bias,
        targets,
        text_row_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        impl=impl,
    )
    return M3AELoss(image + text, image, text, correct)


class M3AEHeads(nn.Module):
    """`m3ae_loss` with the LayerNorm (`norm`) and the heads (`image_head`, `text_head`) that it owns."""

    def __init__(
        self,
        dim: int,
        vocab: int,
        *,
        patch_size: int,
        channels: int = 3,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        norm_pix: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        eps: float = 1e-6,
        impl: str = "auto",
    ):
        super().__init__()
        self.norm = GatherNorm(dim, eps=eps, impl=impl)
        self.image_head = MaskedPixelLoss(
            dim, patch_size=patch_size, channels=channels, mean=mean, std=std, norm_pix=norm_pix, impl=impl
        )
        self.text_head = MaskedTokenLoss(dim, vocab, label_smoothing=label_smoothing, z_loss=z_loss, impl=impl)

    def forward(
        self,
        x: Tensor,
        image_rows: Tensor,
        text_rows: Tensor,
        images: Tensor,
        patch_ids: Tensor,
        image_row_weight: Tensor,
        targets: Tensor,
        text_row_weight: Tensor,
    ) -> M3AELoss:
        """Arguments as in `m3ae_loss`. Each weight is read in its owner's forward alone, as ZeRO-3 asks."""
        hidden = self.norm(x, torch.cat((image_rows, text_rows)))
        image_hidden, text_hidden = hidden.split((image_rows.shape[0], text_rows.shape[0]))
        image = self.image_head(image_hidden, images, patch_ids, image_row_weight)
        text, correct = self.text_head(text_hidden, targets, text_row_weight)
        return M3AELoss(image + text, image, text, correct)
