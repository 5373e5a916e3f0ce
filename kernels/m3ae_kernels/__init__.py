"""Fused ops for masked autoencoders over images and text. Needs torch, and Triton where it runs on a GPU."""

from .gather import GatherNorm, gather_tokens
from .patch_embed import PatchEmbed, patch_embed
from .pixel_loss import MaskedPixelLoss, masked_pixel_loss
from .scatter import scatter_tokens
from .token_loss import MaskedTokenLoss, masked_token_loss

__all__ = [
    "GatherNorm",
    "MaskedPixelLoss",
    "MaskedTokenLoss",
    "PatchEmbed",
    "gather_tokens",
    "masked_pixel_loss",
    "masked_token_loss",
    "patch_embed",
    "scatter_tokens",
]
