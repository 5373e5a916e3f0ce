"""In-place patching of Hugging Face models (transformers 5). Patched models use the ops of this library, and their
parameters, state_dict and losses are unchanged.

As in the unpatched models, a module's parameters are used only in its own forward, as ZeRO-3 and FSDP require.

Shapes: B images, L patches per image, N visible patches per image, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gather import gather_tokens
from .patch_embed import patch_embed
from .pixel_loss import masked_pixel_loss
from .pixels import LARGEST
from .plain import check_plain
from .scatter import scatter_tokens


def patch_model(
    model: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, impl: str = "auto"
) -> nn.Module:
    """Patch a transformers model to use the ops of this library, and return it.

    `ViTMAEForPreTraining`: only visible patches are embedded, and one op restores the order of the patches. In
    training, the decoder's norm, head and loss run only for masked patches, and `logits` is None. In eval mode, outputs
    are unchanged. `ViTMAEModel`: only the embedding is patched. Masks are sampled as in the unpatched model; losses and
    gradients are equal except for rounding. Parameters are unchanged, so optimisers, checkpoints and `save_pretrained`
    are not affected. Patch a model before calling torch.compile and before wrapping it, for example in DDP. After
    unpickling, which restores the model's own code, patch the model again. Calls with `interpolate_pos_encoding=True`
    run the model's own code.

    Args:
        model: the model, which is changed in place.
        mean, std: as in `patch_embed`, one number per channel. If they are given, `pixel_values` may also be uint8 or
            uint16 images.
        impl: "auto", "triton" or "torch".

    Raises:
        TypeError: the model is not supported, or a layer that the ops replace computes more than its class, such as an
            adapter; the message names the supported models or the layer.
    """
    change = KNOWN.get(type(model).__name__)
    if change is None:
        raise TypeError(
            f"m3ae_kernels.patch_model supports transformers' {' and '.join(KNOWN)}, not {type(model).__name__}"
        )
    for name, layer in model.named_modules():
        kind = _REPLACED.get(name.rpartition(".")[2])
        if kind is not None:
            check_plain(f"layer {name}", _unpatched(layer), kind)
    change(model, _Options(mean, std, impl))
    return model


@dataclass(frozen=True)
class _Options:
    mean: Sequence[float] | None
    std: Sequence[float] | None
    impl: str

    def pixels(self, images: Tensor, patch_size: int) -> dict[str, Any]:
        """Return the keyword arguments of the ops that read these images."""
        own = {} if images.is_floating_point() else {"mean": self.mean, "std": self.std}
        return {"patch_size": patch_size, "impl": self.impl, **own}

    def floating(self, images: Tensor) -> Tensor:
        """Return the images as floating-point input for transformers' own code."""
        if images.dtype not in LARGEST or self.mean is None or self.std is None:
            return images
        mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return (images / LARGEST[images.dtype] - mean) / std


def _unpatched(layer: nn.Module) -> nn.Module:
    """Return the layer without the forward that an earlier call of `patch_model`, or unpickling, has set."""
    own = layer.__dict__.get("forward")
    if isinstance(own, MethodType) and (own.__module__ == __name__ or own.__func__ is type(layer).forward):
        layer = copy.copy(layer)
        del layer.forward
    return layer


def _set_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _patch_encoder(model: nn.Module, options: _Options) -> None:
    embeddings: Any = model.embeddings
    _set_forward(embeddings, _embeddings_forward(options))
    _set_forward(embeddings.patch_embeddings.projection, _projection_forward(options))


def _patch_pre_training(model: nn.Module, options: _Options) -> None:
    whole: Any = model
    _patch_encoder(whole.vit, options)
    _set_forward(whole, _pre_training_forward(options))
    _set_forward(whole.decoder, _decoder_forward(options))
    _set_forward(whole.decoder.decoder_norm, _norm_forward(options))
    _set_forward(whole.decoder.decoder_pred, _head_forward(options))


# names of the torch layers whose forward is replaced, and the classes that they must have
_REPLACED = {"projection": nn.Conv2d, "decoder_norm": nn.LayerNorm, "decoder_pred": nn.Linear}
KNOWN = {"ViTMAEForPreTraining": _patch_pre_training, "ViTMAEModel": _patch_encoder}


def _projection_forward(options: _Options) -> Callable:
    def forward(self: nn.Conv2d, images: Tensor, patch_ids_BN: Tensor | None = None) -> Tensor:
        """Return the output of the convolution or, with `patch_ids_BN`, the embeddings of these patches, [B, N, D]."""
        if patch_ids_BN is None:
            return type(self).forward(self, images)
        weight_DK = self.weight.permute(0, 2, 3, 1).flatten(1)
        return patch_embed(images, patch_ids_BN, weight_DK, self.bias, **options.pixels(images, self.kernel_size[0]))

    return forward


def _embeddings_forward(options: _Options) -> Callable:
    def forward(
        self: Any, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool | None = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (embeddings [B, 1 + N, D], mask [B, L], ids_restore [B, L]), as in transformers."""
        if interpolate_pos_encoding or pixel_values.shape[1:] != (self.config.num_channels, *self.image_size):
            return type(self).forward(self, options.floating(pixel_values), noise, interpolate_pos_encoding)
        count, patches = len(pixel_values), self.patch_embeddings.num_patches
        # To find the visible patches, embeddings that contain only the patch numbers are masked. This consumes the same
        # random numbers as transformers' own code.
        numbers_BL1 = torch.arange(patches, device=pixel_values.device).expand(count, -1)[..., None]
        kept_BN1, mask, ids_restore = self.random_masking(numbers_BL1, noise)
        kept_BN = kept_BN1[..., 0]
        x_BND = self.patch_embeddings.projection(pixel_values, kept_BN + _firsts(kept_BN, patches))
        x_BND = x_BND.to(torch.promote_types(x_BND.dtype, self.cls_token.dtype))
        own_BN = torch.arange(kept_BN.numel(), device=kept_BN.device).view_as(kept_BN)
        src = F.pad(own_BN, (1, 0), value=-1)
        position = F.pad(kept_BN + 1, (1, 0))
        x = scatter_tokens(
            x_BND, src, self.cls_token, torch.zeros_like(src), self.position_embeddings, position, impl=options.impl
        )
        return x, mask, ids_restore

    return forward


def _firsts(like_BN: Tensor, each: int) -> Tensor:
    """Return the index of the first row of each image, [B, 1], when every image has `each` rows."""
    return each * torch.arange(len(like_BN), device=like_BN.device)[:, None]


def _decoder_forward(options: _Options) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        ids_restore: Tensor,
        interpolate_pos_encoding: bool | None = False,
        images: Tensor | None = None,
    ) -> Any:
        """Return the same output as transformers or, with images, the mean loss of the masked patches."""
        if images is None:
            return type(self).forward(self, hidden_states, ids_restore, interpolate_pos_encoding)
        x = self.decoder_embed(hidden_states)
        x = x.to(torch.promote_types(x.dtype, self.mask_token.dtype))
        (_, rows, _), (count, patches) = x.shape, ids_restore.shape
        visible = ids_restore < rows - 1
        src = F.pad(torch.where(visible, ids_restore + 1 + _firsts(ids_restore, rows), -1), (1, 0))
        src[:, :1] = _firsts(ids_restore, rows)
        positions = torch.arange(patches + 1, device=src.device).expand(count, -1)
        x = scatter_tokens(
            x, src, self.mask_token, torch.zeros_like(src), self.decoder_pos_embed, positions, impl=options.impl
        )
        for layer in self.decoder_layers:
            x = layer(x)
        masked = ids_restore.argsort(1)[:, rows - 1 :]
        hidden = self.decoder_norm(x, masked + 1 + _firsts(masked, patches + 1))
        return self.decoder_pred(hidden, images, masked + _firsts(masked, patches), self.config)

    return forward


def _norm_forward(options: _Options) -> Callable:
    def forward(self: nn.LayerNorm, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the LayerNorm of x, or only of `rows` if given."""
        if rows is None:
            return type(self).forward(self, x)
        return gather_tokens(x, rows, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps, impl=options.impl)

    return forward


def _head_forward(options: _Options) -> Callable:
    def forward(
        self: nn.Linear, hidden: Tensor, images: Tensor | None = None, patch_ids: Tensor | None = None,
        config: Any = None,
    ) -> Tensor:  # fmt: skip
        """Return the output of the Linear or, with images, the mean loss of its predictions of the patches
        `patch_ids`."""
        if images is None or patch_ids is None:
            return type(self).forward(self, hidden)
        pixels = options.pixels(images, config.patch_size)
        return masked_pixel_loss(
            hidden, self.weight, images, patch_ids, bias=self.bias, norm_pix=config.norm_pix_loss, reduction="mean",
            **pixels,
        )  # fmt: skip

    return forward


def _pre_training_forward(options: _Options) -> Callable:
    def forward(
        self: Any,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the same output as transformers, but without logits in training."""
        if not self.training or interpolate_pos_encoding:
            images = options.floating(pixel_values)
            return type(self).forward(self, images, noise, interpolate_pos_encoding, attention_mask, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        encoded = self.vit(pixel_values, noise=noise, attention_mask=attention_mask, return_dict=True, **kwargs)
        loss = self.decoder(encoded.last_hidden_state, encoded.ids_restore, images=pixel_values)
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

        output = ViTMAEForPreTrainingOutput(
            loss=loss, mask=encoded.mask, ids_restore=encoded.ids_restore, hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )  # fmt: skip
        return output if (self.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    return forward
