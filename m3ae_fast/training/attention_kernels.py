"""Choice of the attention kernels of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from m3ae_kernels.attention import cuda
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.dispatch import requested_impl

from m3ae_fast.batch.masking import kept
from m3ae_fast.config import MaskingConfig, ModelConfig

Names = dict[str, str]  # names of kernels, by part of the network


@dataclass(frozen=True)
class RunAttention:
    """The attention kernels of a run's encoder and decoder."""

    config: ModelConfig
    masking: MaskingConfig
    device: torch.device
    dtype: torch.dtype

    def choose(self, samples: int, known: Names | None = None) -> tuple[Names, dict[str, dict[str, float]]]:
        """Benchmark the installed kernels on a micro-batch of `samples` samples. Return the name of the fastest kernel
        for the encoder and for the decoder, and the milliseconds of each kernel that works. Kernels in `known` are
        returned without a benchmark if they work on this machine. On a CPU, or if M3AE_KERNELS_IMPL is set, no
        benchmark is needed, and the result is empty. Call this method on one rank only, so that all ranks use the same
        kernels, and pass the result to `use_kernels` on every rank."""
        names: Names = {}
        times: dict[str, dict[str, float]] = {}
        if self.device.type != "cuda" or requested_impl("auto") != "auto":
            return names, times
        for part, size in self._sizes().items():
            name = (known or {}).get(part)
            if name is None or not self._works(size, name):
                times[part] = cuda.trial(self.device, self.dtype, *size, samples)
                name = next(iter(times[part]), PADDED.name)
            names[part] = name
        return names, times

    def use_kernels(self, names: Names) -> None:
        """Set the attention kernels of the encoder and the decoder to the kernels that `choose` returned on this or
        another rank."""
        sizes = self._sizes()
        for part, name in names.items():
            cuda.use_kernel(self.device, self.dtype, *sizes[part], name)

    def describe(self) -> str:
        """Return the names of the kernels of encoder and decoder. On CUDA, a kernel that has not been set yet is first
        chosen by a benchmark."""
        impl = requested_impl("auto")
        find = cuda.choose_by_benchmark if impl == "auto" and self.device.type == "cuda" else partial(kernel_for, impl)
        encoder, decoder = (find(self.device, self.dtype, *size).name for size in self._sizes().values())
        return encoder if encoder == decoder else f"{encoder} (encoder), {decoder} (decoder)"

    def _works(self, size: tuple[int, int, int], name: str) -> bool:
        try:
            cuda.use_kernel(self.device, self.dtype, *size, name)
        # a kernel chosen on another machine may not be installed on this one, or its build may be broken
        except Exception:
            return False
        return True

    def _sizes(self) -> dict[str, tuple[int, int, int]]:
        """Return the number of heads, the head dimension, and the number of keys of a sample, by part of the
        network."""
        c, masking = self.config, self.masking
        patches, tokens = c.most_patches, c.text_length if c.vocab_size else 0
        visible, rows = 1 + kept(patches, masking.image_ratio) + kept(tokens, masking.text_ratio), 1 + patches + tokens
        return {
            "encoder": (c.num_heads, c.emb_dim // c.num_heads, visible),
            "decoder": (
                c.dec_num_heads,
                c.dec_emb_dim // c.dec_num_heads,
                visible if c.dec_attention == "cross" else rows,
            ),
        }
