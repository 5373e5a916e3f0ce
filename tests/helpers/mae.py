"""A second implementation of facebookresearch/mae with timm's blocks: names of weights, encoder, decoder and loss.

Shapes: B images, L patches, P patch size, D and E widths of encoder and decoder.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

SIZE, PATCH = 24, 8


class MAE(nn.Module):
    def __init__(self, dim: int = 24, depth: int = 2, heads: int = 3, dec_dim: int = 16, dec_heads: int = 2) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(SIZE, PATCH, 3, dim)
        length = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(dim)
        self.decoder_embed = nn.Linear(dim, dec_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dec_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + length, dec_dim))
        self.decoder_blocks = nn.ModuleList([Block(dec_dim, dec_heads, qkv_bias=True, norm_layer=norm)])
        self.decoder_norm = norm(dec_dim)
        self.decoder_pred = nn.Linear(dec_dim, PATCH**2 * 3)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 1:
                    p.add_(0.1 * torch.randn_like(p))
                if name.endswith("pos_embed"):
                    p[:, 0] = 0

    def tokens(self, images_BCHW: Tensor, before_norm: bool = False) -> Tensor:
        """Return the tokens [B, 1 + L, D] of the whole image."""
        x = self.patch_embed(images_BCHW) + self.pos_embed[:, 1:]
        x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x), 1)
        x = nn.Sequential(*self.blocks)(x)
        return x if before_norm else self.norm(x)

    def loss(self, images_BCHW: Tensor, mask_BL: Tensor, norm_pix: bool) -> Tensor:
        """Return the mean loss over the masked patches of the whole batch. Images may have different numbers of masked
        patches."""
        patches = images_BCHW.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1)
        target = patches.flatten(3).flatten(1, 2)
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        errors = []
        # one by one, because the numbers of masked patches differ
        for image, mask, wanted in zip(images_BCHW, mask_BL, target):
            x = (self.patch_embed(image[None]) + self.pos_embed[:, 1:])[:, ~mask]
            x = torch.cat((self.cls_token + self.pos_embed[:, :1], x), 1)
            x = self.decoder_embed(self.norm(nn.Sequential(*self.blocks)(x)))
            full = self.mask_token.repeat(1, len(mask), 1)
            full[:, ~mask] = x[:, 1:]
            x = torch.cat((x[:, :1], full), 1) + self.decoder_pos_embed
            x = self.decoder_pred(self.decoder_norm(nn.Sequential(*self.decoder_blocks)(x)))[0, 1:]
            errors.append((x - wanted).square().mean(-1)[mask])
        return torch.cat(errors).mean()
