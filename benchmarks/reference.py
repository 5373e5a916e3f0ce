"""M3AE without this engine: the baselines for the benchmarks of whole steps.

With `expert=False`, `ReferenceM3AE` performs the same computations as the official JAX code: it embeds all patches and
then drops the masked ones, pads captions to `text_length`, runs every block on every row, writes attention out as
softmax(q k^T) v, and computes logits and pixels for all positions. With `expert=True`, it is optimised by hand: it
embeds only visible patches, and computes pixels and logits only for masked, valid positions. The expert uses
scaled_dot_product_attention, torch.compile, fused AdamW and, if that is faster, bf16 autocast.

The parameters have the same names as those of `m3ae_fast.model.m3ae.M3AE`, so that they can be loaded by
`load_state_dict`.

Shapes: B samples, L patches, X text positions, K visible rows, N rows, D width, H heads, V vocabulary, P patch size, M
masked patches of an image, W masked, valid tokens of the batch. In `patches_BLK`, K is the number of values of a patch,
P * P * C for C channels.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.batch.masking import kept
from m3ae_fast.config import Config, LossConfig, MaskingConfig, ModelConfig
from m3ae_fast.engine.optimizer import ADAM_EPS
from m3ae_fast.engine.parameter_groups import parameter_groups
from m3ae_fast.model.positions import sincos_1d, sincos_2d

EPS = 1e-6


@dataclass
class PaddedBatch:
    """A batch of images with captions that are padded to the same length. Every sample has an image and a caption."""

    images_BCHW: Tensor  # float32, normalised; normalisation is not part of the step
    image_mask_BL: Tensor  # bool, True = masked
    tokens_BX: Tensor  # int64, 0 for padding
    text_mask_BX: Tensor  # bool, sampled over all X positions
    padding_BX: Tensor  # bool, True = padding
    # added for the expert, so that its step neither searches for positions nor synchronises with the device
    masked_image_BM: Tensor  # int64, the masked patches of each image
    masked_text_W: Tensor  # int64, the masked, valid tokens among B * X
    text_weight_W: Tensor  # float32, 1 / (B * number of masked, valid tokens of the same caption)

    @classmethod
    def of(
        cls, images_BCHW: Tensor, image_mask_BL: Tensor, tokens_BX: Tensor, text_mask_BX: Tensor, padding_BX: Tensor
    ):
        """Return a batch with the additional tensors for the expert. All images must have the same number of masked
        patches."""
        masked_BX = text_mask_BX & ~padding_BX
        weight_BX = 1 / (len(masked_BX) * masked_BX.sum(1, keepdim=True).clamp(min=1)).expand_as(masked_BX)
        return cls(
            images_BCHW,
            image_mask_BL,
            tokens_BX,
            text_mask_BX,
            padding_BX,
            image_mask_BL.nonzero()[:, 1].unflatten(0, (len(image_mask_BL), -1)),
            masked_BX.flatten().nonzero()[:, 0],
            weight_BX[masked_BX],
        )

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(*(t.to(device) for t in vars(self).values()))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, padding_BN: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D / H]
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=~padding_BN[:, None, None])
        else:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            out = scores.masked_fill(padding_BN[:, None, None], -1e7).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x_BND: Tensor, padding_BN: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), padding_BN)
        return x_BND + self.mlp(self.norm2(x_BND))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x_BND: Tensor, padding_BN: Tensor) -> Tensor:
        for block in self.blocks:
            x_BND = block(x_BND, padding_BN)
        return self.norm(x_BND)


class ReferenceM3AE(nn.Module):
    """The model with its losses. It supports only image-text pairs and output heads without hidden layers."""

    def __init__(self, config: ModelConfig, masking: MaskingConfig, loss: LossConfig, *, expert: bool) -> None:
        super().__init__()
        dim, width = config.emb_dim, config.dec_emb_dim
        self.config, self.masking, self.loss, self.expert = config, masking, loss, expert

        def row(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, size))

        self.patch_embed = nn.Linear(config.patch_dim, dim)
        words = nn.Parameter(torch.empty(config.vocab_size, dim))
        self.encoder_input = nn.ParameterDict(
            {"cls_token": row(dim), "text_embedding": words, "image_type": row(dim), "text_type": row(dim)}
        )
        self.encoder = Transformer(dim, config.depth, config.num_heads, config.mlp_ratio, expert)
        names = ("image_mask", "text_mask", "image_type", "text_type")
        unshuffle = nn.ParameterDict({name: row(width) for name in names})
        self.decoder_input = nn.ModuleDict({"proj": nn.Linear(dim, width), "unshuffle": unshuffle})
        self.decoder = Transformer(width, config.dec_depth, config.dec_num_heads, config.mlp_ratio, expert)
        self.image_head = nn.Linear(width, config.patch_dim)
        self.text_head = nn.Linear(width, config.vocab_size)
        side, places = config.image_size // config.patch_size, torch.arange(config.text_length)
        for name, size in (("encoder", dim), ("decoder", width)):
            self.register_buffer(f"{name}_image_positions", sincos_2d(size, side), persistent=False)
            self.register_buffer(f"{name}_text_positions", sincos_1d(size, places), persistent=False)

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """Return the patches [B, L, P * P * C], each in the order (row, column, channel)."""
        p = self.config.patch_size
        blocks = images_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, rows, P, columns, P]
        return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return the weighted sum of both losses, a 0-d tensor."""
        patches_BLK = self.patchify(batch.images_BCHW)
        encoder, decoder = self.encoder_input, self.decoder_input["unshuffle"]
        image_order = batch.image_mask_BL.int().argsort(dim=1, stable=True)  # visible patches first
        text_order = batch.text_mask_BX.int().argsort(dim=1, stable=True)
        seen_image = image_order[:, : kept(image_order.shape[1], self.masking.image_ratio)]
        seen_text = text_order[:, : kept(text_order.shape[1], self.masking.text_ratio)]

        image_types = self.encoder_image_positions + encoder["image_type"]
        words = F.embedding(batch.tokens_BX, encoder["text_embedding"])
        text = words + self.encoder_text_positions + encoder["text_type"]
        if self.expert:
            image = self.patch_embed(take(patches_BLK, seen_image)) + image_types[seen_image]
        else:
            image = take(self.patch_embed(patches_BLK) + image_types, seen_image)
        cls = encoder["cls_token"].expand(len(image), 1, -1)
        x_BKD = torch.cat((cls, image, take(text, seen_text)), 1)
        seen_padding = batch.padding_BX.gather(1, seen_text)
        x_BKD = self.encoder(x_BKD, pad_left(seen_padding, 1 + seen_image.shape[1]))

        sizes = (1, seen_image.shape[1], seen_text.shape[1])
        cls, seen_image, seen_text = self.decoder_input["proj"](x_BKD).split(sizes, 1)
        image = restore(seen_image, decoder["image_mask"], image_order)
        text = restore(seen_text, decoder["text_mask"], text_order)
        image = image + self.decoder_image_positions + decoder["image_type"]
        text = text + self.decoder_text_positions + decoder["text_type"]
        x_BND = self.decoder(torch.cat((cls, image, text), 1), pad_left(batch.padding_BX, 1 + image.shape[1]))
        _, image, text = x_BND.split((1, image.shape[1], text.shape[1]), 1)

        if self.expert:
            return self.loss_of_masked(image, text, patches_BLK, batch)
        error_BL = (self.image_head(image).float() - patches_BLK).square().mean(-1)
        image_loss = masked_mean(error_BL, batch.image_mask_BL)
        logits_BXV = self.text_head(text).float()
        error_BX = F.cross_entropy(logits_BXV.flatten(0, 1), batch.tokens_BX.flatten(), reduction="none")
        text_loss = masked_mean(error_BX.view_as(batch.tokens_BX), batch.text_mask_BX & ~batch.padding_BX)
        return self.loss.image_weight * image_loss + self.loss.text_weight * text_loss

    def loss_of_masked(self, image_BLD: Tensor, text_BXD: Tensor, patches_BLK: Tensor, batch: PaddedBatch) -> Tensor:
        """Return the weighted sum of both losses, computed from predictions for only the masked, valid positions. All
        images must have the same number of masked patches."""
        hidden_image = take(image_BLD, batch.masked_image_BM).flatten(0, 1)
        target_image = take(patches_BLK, batch.masked_image_BM).flatten(0, 1)
        image_loss = (self.image_head(hidden_image).float() - target_image).square().mean()
        logits_WV = self.text_head(text_BXD.flatten(0, 1)[batch.masked_text_W]).float()
        error_W = F.cross_entropy(logits_WV, batch.tokens_BX.flatten()[batch.masked_text_W], reduction="none")
        text_loss = (error_W * batch.text_weight_W).sum()
        return self.loss.image_weight * image_loss + self.loss.text_weight * text_loss


def take(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    return x_BND.gather(1, ids_BK[..., None].expand(-1, -1, x_BND.shape[-1]))


def restore(seen_BKD: Tensor, mask_1D: Tensor, order_BN: Tensor) -> Tensor:
    """Return visible rows and mask rows in the original order."""
    masks = mask_1D.to(seen_BKD.dtype).expand(len(seen_BKD), order_BN.shape[1] - seen_BKD.shape[1], -1)
    return take(torch.cat((seen_BKD, masks), 1), order_BN.argsort(1))


def pad_left(padding: Tensor, rows: int) -> Tensor:
    return F.pad(padding, (rows, 0), value=False)


def masked_mean(error_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Return the mean over samples of the mean over a sample's masked positions. A sample without masked positions
    counts as 0."""
    return ((error_BN * mask_BN).sum(1) / mask_BN.sum(1).clamp(min=1)).mean()


class ReferenceTrainer:
    """A trainer of a ReferenceM3AE with AdamW, starting from the weights `state`.

    `expert`: False for eager computation in float32; True for torch.compile, fused AdamW and, if train.precision is
    bf16, autocast.
    """

    def __init__(
        self,
        config: Config,
        state: dict[str, Tensor],
        device: torch.device,
        *,
        expert: bool,
    ) -> None:
        optim = config.optim
        self.model = ReferenceM3AE(config.model, config.masking, config.loss, expert=expert).to(device)
        self.model.load_state_dict(state)
        groups = parameter_groups(self.model, optim.weight_decay)
        options = {"fused": True} if expert else {}
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=ADAM_EPS, **options)
        bf16 = expert and config.train.precision == "bf16"
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else contextlib.nullcontext
        if expert:
            self.model.compile()

    def step(self, batch: PaddedBatch, lr: float) -> Tensor:
        """Take a step, and return the loss before the update."""
        with self.autocast():
            loss = self.model(batch)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
