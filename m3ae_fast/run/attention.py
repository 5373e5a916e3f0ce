"""Choose and name the attention kernels of a run."""

from __future__ import annotations

from functools import partial

import torch
from m3ae_kernels.attention import cuda
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.dispatch import asked_impl

from m3ae_fast.batch.masking import kept
from m3ae_fast.config import MaskingConfig, ModelConfig

Names = dict[str, str]  # of kernels, by part of the network


def choose_attention(
    config: ModelConfig,
    masking: MaskingConfig,
    device: torch.device,
    dtype: torch.dtype,
    samples: int,
    known: Names | None = None,
) -> tuple[Names, dict[str, dict[str, float]]]:
    """Try what is installed at a micro-batch of `samples`, and return the fastest for encoder and decoder, with the
    milliseconds of each that works; without a trial what is `known`, where it works here. Nothing where no trial
    decides: on a CPU, or where M3AE_KERNELS_IMPL does.

    For one rank, so that all ranks run the same: `settle_attention` is for each."""
    names: Names = {}
    times: dict[str, dict[str, float]] = {}
    if device.type != "cuda" or asked_impl("auto") != "auto" or config.att_drop:
        return names, times
    for part, size in _sizes(config, masking).items():
        name = (known or {}).get(part)
        if name is None or not _works(device, dtype, size, name):
            times[part] = cuda.trial(device, dtype, *size, samples)
            name = next(iter(times[part]), PADDED.name)
        names[part] = name
    return names, times


def settle_attention(
    config: ModelConfig, masking: MaskingConfig, device: torch.device, dtype: torch.dtype, names: Names
) -> None:
    """Let encoder and decoder run on the kernels that `choose_attention` returned, on this rank or another."""
    sizes = _sizes(config, masking)
    for part, name in names.items():
        cuda.settle(device, dtype, *sizes[part], name)


def _works(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], name: str) -> bool:
    try:
        cuda.settle(device, dtype, *size, name)
    except Exception:  # of another machine: not installed here, or a broken build
        return False
    return True


def _sizes(config: ModelConfig, masking: MaskingConfig) -> dict[str, tuple[int, int, int]]:
    """Return by part of the network heads, values a head, and rows of a whole sample."""
    patches, tokens = config.most_patches, config.text_length if config.vocab_size else 0
    visible, rows = 1 + kept(patches, masking.image_ratio) + kept(tokens, masking.text_ratio), 1 + patches + tokens
    return {
        "encoder": (config.num_heads, config.emb_dim // config.num_heads, visible),
        "decoder": (config.dec_num_heads, config.dec_emb_dim // config.dec_num_heads, rows),
    }


def describe_attention(config: ModelConfig, masking: MaskingConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return what attention runs on in the encoder and in the decoder; on CUDA it is tried unless it is settled."""
    if config.att_drop:
        return "padded SDPA"
    impl = asked_impl("auto")
    find = cuda.try_out if impl == "auto" and device.type == "cuda" else partial(kernel_for, impl)
    encoder, decoder = (find(device, dtype, *size).name for size in _sizes(config, masking).values())
    return encoder if encoder == decoder else f"{encoder} (encoder), {decoder} (decoder)"
