"""Estimate of the memory per rank, itemised by consumer. `--dry-run` prints it, and the engine uses it to decide
whether to keep all activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3ae_fast.base.hardware import missing_memory
from m3ae_fast.batch.masking import draw_mask, draw_predicted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import Config, TrainConfig
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import Ranks

# length of a typical caption relative to text_length: a caption of CC12M has about 20 words, and text_length is 64
CAPTION_FRACTION = 1 / 3
# Stage 3 releases a gathered weight after its use in the forward pass only if the step reads more weights than this
# before it uses that weight in the backward pass. This is DeepSpeed's default of stage3_max_reuse_distance.
_REUSED = 1_000_000_000


def memory_needed(config: Config, world: int, samples: int) -> float:
    """Return the bytes of memory that a rank requires for steps with `samples` samples per rank, if blocks keep all
    activations or, with activation checkpointing, only their inputs. `world`: number of ranks."""
    with torch.device("meta"):
        model = M3AE(config.model, config.loss)
    parameters = sum(p.numel() for p in model.parameters())
    stage = 0 if config.zero is None else config.zero.stage
    micro = min(samples, config.train.micro_batch or samples)
    matrices = matrix_elements(config, model)
    state = zero_bytes(parameters, stage, world, in_bf16(config), matrices)
    activations = micro * activation_bytes(config, typical_batch(config, model))
    return peak_bytes(sum(state), activations, matrices, stage, world)


def lacking_for_activations(config: Config, ranks: Ranks, samples: int, others: float = 0.0) -> str:
    """Return a message about the first rank without enough memory for all activations of a micro-batch of `samples`
    samples, and for `others` bytes; "" if every rank has enough. Must be called on every rank, before the weights are
    on the device."""
    needed = memory_needed(config, ranks.world, samples) + others
    return next(filter(None, ranks.gather(missing_memory(needed, ranks.device))), "")


def recomputes(train: TrainConfig) -> bool:
    """Return whether blocks may recompute outputs of GELU and LayerNorm to save memory. They may if they are compiled
    and activation checkpointing is off."""
    return train.compile and not train.activation_checkpointing


def matrix_elements(config: Config, model: M3AE) -> int:
    """Return the number of weights that Muon updates."""
    return sum(p.numel() for p in model.hidden_matrices()) if config.optim.name == "muon" else 0


def peak_bytes(state: float, activations: float, matrices: int, stage: int, world: int) -> float:
    """Return the peak memory per GPU in bytes, given the bytes of the state and of the activations. Because activations
    are freed before an update by Muon, the sum includes only the larger of the activations and the memory for this
    update; see `muon_bytes` for the other arguments."""
    return state + max(activations, muon_bytes(matrices, stage, world))


def muon_bytes(matrices: int, stage: int, world: int) -> float:
    """Return the bytes per GPU that an update by Muon requires in addition to the state: the gathered update of all
    matrices in float32, and at most three copies of the matrices that this rank orthogonalises. Activations are already
    freed at that time. `matrices`: number of weights that Muon updates."""
    return 4 * matrices * (1 + 3 / (world if stage >= 1 else 1))


def zero_bytes(parameters: int, stage: int, world: int, bf16: bool, matrices: int = 0) -> tuple[float, float, float]:
    """Return the bytes per GPU of the weights, of the gradients, and of the float32 master weights and moments (ZeRO,
    arXiv 1910.02054, section 5), for a number of `parameters` and a ZeRO `stage` on `world` ranks. Gradients are
    accumulated in float32. The weights of stage 3 include those that remain gathered. `matrices`: number of weights
    that Muon updates, which have one moment instead of two."""
    master = 4 if bf16 and stage > 0 else 0  # at stage 0, the weights themselves are float32
    weights = parameters / world + still_gathered(parameters) * (world > 1) if stage == 3 else parameters
    return (
        (2 if master else 4) * weights,
        4 * parameters / (world if stage >= 2 else 1),
        ((8 + master) * parameters - 4 * matrices) / (world if stage >= 1 else 1),
    )


def still_gathered(parameters: int) -> float:
    """Return the number of weights that stage 3 keeps gathered on each rank between the forward and the backward pass,
    if there are several ranks. They are the last weights of the forward pass, which the backward pass uses first.
    `parameters`: number of all weights."""
    return min(parameters, _REUSED / 2)


def in_bf16(config: Config) -> bool:
    """Return whether matmuls run in bf16; "auto" selects bf16 on the GPUs for which the estimate is made."""
    return config.train.precision != "fp32"


def caption_tokens(config: Config) -> int:
    """Return the number of tokens of a typical caption."""
    return round(config.model.text_length * CAPTION_FRACTION) if config.model.vocab_size else 0


def typical_batch(config: Config, model: M3AE) -> PackedBatch:
    """Return a batch of one masked square image with the maximum number of patches, and a caption of typical length."""
    m, masking = config.model, config.masking
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(m.most_patches)
    shape = m.channels, side * m.patch_size, side * m.patch_size
    sample = Sample("typical", torch.zeros((), dtype=getattr(torch, model.config.image_dtype)).expand(shape))
    sample.image_mask = draw_mask(side * side, masking.image_ratio, generator)
    sample.image_predicted = draw_predicted(sample.image_mask, masking.image_predicted, generator)
    if m.vocab_size:
        sample.tokens = torch.zeros(caption_tokens(config), dtype=torch.int64)
        sample.text_mask = draw_mask(len(sample.tokens), masking.text_ratio, generator)
        sample.text_predicted = draw_predicted(sample.text_mask, masking.text_predicted, generator)
    return pack([sample], model.geometry)


def activation_bytes(config: Config, batch: PackedBatch) -> float:
    """Return the bytes of the activations of a batch. For each row of width D, a block keeps the outputs of 2
    LayerNorms, q, k, v, the attention output, 2 residual sums, and the hidden activations of the MLP twice. In a
    decoder with cross-attention, the k and v of a block belong to the encoder's rows, and are kept even if the block is
    checkpointed."""
    m = config.model
    cross = m.dec_attention == "cross"
    size = 2 if in_bf16(config) else 4
    by_encoder = 8 + 2 * m.mlp_ratio
    by_decoder = by_encoder - 2 if cross else by_encoder
    if config.train.activation_checkpointing:  # with activation checkpointing, only the input of each block is kept
        by_encoder = by_decoder = 1
    encoder = by_encoder * m.depth * batch.encoder.rows * m.emb_dim
    decoder = by_decoder * m.dec_depth * batch.decoder.rows * m.dec_emb_dim
    keys_and_values = 2 * m.dec_depth * batch.encoder.rows * m.dec_emb_dim if cross else 0
    return size * (encoder + decoder + keys_and_values)


# Ops that allocate a copy of their largest tensor on a CPU: oneDNN copies the input or the output of a convolution to
# its own layout, and the MLP allocates the output of GELU.
_COPY = ("aten::convolution", "m3ae::mlp")


class PeakOfPass(TorchDispatchMode):
    """A context that measures the memory of a forward pass without gradients. Its result, `peak`, is the largest number
    of bytes of tensors that exist at the same time. Only `images` and the tensors that are computed from them count.
    Tensors that are computed only from weights are left out, because their size does not depend on the number of
    images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.peak, self._alive = 0, WeakValueDictionary(_storages(images))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {address: each for address, each in _storages((args, kwargs)).items() if address in self._alive}
        if given:
            made = _storages(found)
            self._alive.update(made)
            copied = max(each.nbytes() for each in (*given.values(), *made.values())) if func.name() in _COPY else 0
            self.peak = max(self.peak, sum(each.nbytes() for each in self._alive.values()) + copied)
        return found


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors in nested containers, by their address."""
    found = [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]
    return {each.data_ptr(): each for each in found}
