"""Fused ops for masked autoencoders over images and text. Requires torch, numpy and, on a GPU, Triton."""

from .attention import packed_attention
from .bias_gelu import bias_gelu
from .gather import GatherNorm, gather_tokens
from .hog_loss import MaskedHogLoss, hog_targets, masked_hog_loss
from .hugging_face import patch_model
from .ids import flat_ids
from .m3ae_loss import M3AEHeads, M3AELoss, head_inputs, m3ae_loss
from .patch_embed import PatchEmbed, patch_embed
from .pixel_loss import MaskedPixelLoss, masked_pixel_loss
from .scatter import scatter_orders, scatter_tokens
from .token_loss import MaskedTokenLoss, masked_token_loss
from .version import __version__

__all__ = [
    "GatherNorm",
    "M3AEHeads",
    "M3AELoss",
    "MaskedHogLoss",
    "MaskedPixelLoss",
    "MaskedTokenLoss",
    "PatchEmbed",
    "__version__",
    "bias_gelu",
    "flat_ids",
    "gather_tokens",
    "head_inputs",
    "hog_targets",
    "m3ae_loss",
    "masked_hog_loss",
    "masked_pixel_loss",
    "masked_token_loss",
    "packed_attention",
    "patch_embed",
    "patch_model",
    "scatter_orders",
    "scatter_tokens",
]
