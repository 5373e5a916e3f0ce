"""Weights of a model for more image channels than those with which it was trained.

Shapes: C channels of the given weights, N channels of the new model, D width, K = P * P positions in a patch, E decoder
width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from m3ae_fast.config import ModelConfig

_HEAD = "image_head"


def widened(state: Mapping[str, Tensor], was: ModelConfig, now: ModelConfig, norm_pix: bool) -> dict[str, Tensor]:
    """Return weights for a model with more channels. As in timm, the weights of the input layer are repeated in the
    order of the channels, and divided by the number of copies. The mean and the standard deviation of the new channels
    are taken into account, so an image whose new channels are copies of the old channels has the same features. The
    weights with which pixels are predicted are repeated too.

    Args:
        state: the weights, with or without a decoder.
        was: the config of the weights.
        now: the config of the new model.
        norm_pix: loss.norm_pix of the new model, with which predictions do not depend on the mean and the standard
            deviation of the channels.
    """
    new = dict(state)
    if not _fits(state, was):  # the caller checks the shapes of all weights, and names the first one that does not fit
        return new
    source_N = torch.arange(now.channels) % was.channels  # the channel that is copied to each new channel
    copies_C = source_N.bincount(minlength=was.channels).double()
    mean_C, std_C = (torch.tensor(values, dtype=torch.float64) for values in (was.image_mean, was.image_std))
    mean_N, std_N = (torch.tensor(values, dtype=torch.float64) for values in (now.image_mean, now.image_std))

    weight_DKC = _by_channel(state["patch_embed.weight"], was.channels)
    weight_DKN = weight_DKC[..., source_N] * (std_N / (std_C * copies_C)[source_N])
    center_C = torch.zeros_like(mean_C).index_add(0, source_N, mean_N) / copies_C  # means over the copies
    moved_D = (weight_DKC * ((center_C - mean_C) / std_C)).sum((1, 2))
    _set(new, "patch_embed.weight", weight_DKN.flatten(1))
    _set(new, "patch_embed.bias", state["patch_embed.bias"].double() + moved_D)

    if f"{_HEAD}.weight" in state and was.image_targets == now.image_targets == "pixels":
        weight_EKN = _by_channel(state[f"{_HEAD}.weight"].T, was.channels)[..., source_N]
        bias_KN = _by_channel(state[f"{_HEAD}.bias"][None], was.channels)[0, :, source_N]
        if not norm_pix:  # predictions are in units of the standard deviation, relative to the mean
            weight_EKN = weight_EKN * (std_C[source_N] / std_N)
            bias_KN = (bias_KN * std_C[source_N] + mean_C[source_N] - mean_N) / std_N
        _set(new, f"{_HEAD}.weight", weight_EKN.flatten(1).T)
        _set(new, f"{_HEAD}.bias", bias_KN.flatten())
    return new


def _fits(state: Mapping[str, Tensor], config: ModelConfig) -> bool:
    """Return whether the weights that are widened exist and have the shapes that the config implies."""
    shapes = {"patch_embed.weight": (config.emb_dim, config.patch_dim), "patch_embed.bias": (config.emb_dim,)}
    if f"{_HEAD}.weight" in state:
        outputs = config.image_output_dim
        shapes |= {f"{_HEAD}.weight": (outputs, config.dec_emb_dim), f"{_HEAD}.bias": (outputs,)}
    return all(name in state and state[name].shape == shape for name, shape in shapes.items())


def _by_channel(weight: Tensor, channels: int) -> Tensor:
    """Split the last axis of weights [..., K * C] into positions and channels, in float64."""
    return weight.double().unflatten(-1, (-1, channels))


def _set(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Replace a weight, and keep its dtype."""
    state[name] = value.to(state[name].dtype).contiguous()


def words(was: int, now: int) -> str:
    """Return a description of the change of the number of channels, for messages."""
    return f"the input layer is widened from {was} to {now} channels by repeating its weights"
