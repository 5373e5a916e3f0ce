"""Name the attention kernels of a run."""

from __future__ import annotations

from functools import partial

import torch
from m3ae_kernels.attention import cuda
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.dispatch import asked_impl

from m3ae_fast.batch.masking import kept
from m3ae_fast.config import MaskingConfig, ModelConfig


def describe_attention(config: ModelConfig, masking: MaskingConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return what attention runs on in the encoder and in the decoder. On CUDA this is when kernels are tried."""
    if config.att_drop:
        return "padded SDPA"
    patches, tokens = config.patches_per_image, config.text_length if config.vocab_size else 0
    visible, rows = 1 + kept(patches, masking.image_ratio) + kept(tokens, masking.text_ratio), 1 + patches + tokens
    sizes = ((config.emb_dim, config.num_heads, visible), (config.dec_emb_dim, config.dec_num_heads, rows))
    impl = asked_impl("auto")
    find = cuda.try_out if impl == "auto" and device.type == "cuda" else partial(kernel_for, impl)
    encoder, decoder = (find(device, dtype, heads, dim // heads, length).name for dim, heads, length in sizes)
    return encoder if encoder == decoder else f"{encoder} (encoder), {decoder} (decoder)"
