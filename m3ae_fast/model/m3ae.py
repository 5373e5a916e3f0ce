"""M3AE (arXiv 2205.14204): one ViT encoder over visible patches and visible text, a light decoder, two losses.

Shapes: T encoder rows, U decoder rows, M rows that carry loss (I patches, W text tokens), D encoder width, E decoder
width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from m3ae_kernels import MaskedPixelLoss, MaskedTokenLoss, scatter_tokens
from torch import Tensor, nn

from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.encoder import MultimodalEncoder, drop_options, pixel_options
from m3ae_fast.model.packing import Geometry
from m3ae_fast.model.positions import Positions
from m3ae_fast.model.pretrained import load_weights, read_pretrained, write_pretrained
from m3ae_fast.model.transformer import EPS, Transformer


class Losses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate, the others are detached.

    A tuple, since DeepSpeed finds what it differentiates in tuples, lists and dicts alone.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    text_accuracy: Tensor


class DecoderInput(nn.Module):
    """Encoder rows -> decoder rows: projection, un-shuffle, mask embeddings, positions and types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dec_emb_dim
        self.proj = nn.Linear(config.emb_dim, dim)
        self.unshuffle = Unshuffle(config, dim)

    def forward(self, encoded_TD: Tensor, batch: PackedBatch) -> Tensor:
        return self.unshuffle(self.proj(encoded_TD), batch)


class Unshuffle(nn.Module):
    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.image_mask = nn.Parameter(torch.empty(1, dim))
        self.text_mask = nn.Parameter(torch.empty(1, dim)) if config.vocab_size else None
        self.image_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding else None
        self.text_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding and config.vocab_size else None
        self.positions = Positions(config, dim)

    def forward(self, x_TE: Tensor, batch: PackedBatch) -> Tensor:
        masks = self.image_mask if self.text_mask is None else torch.cat((self.image_mask, self.text_mask))
        table = torch.cat(self.positions(self.image_type, self.text_type))
        return scatter_tokens(x_TE, batch.decoder_src, masks, batch.mask_ids, table, batch.decoder_table_ids)


class HeadMLP(nn.Module):
    """The hidden layers of an output head: LayerNorm, then (Linear, GELU, LayerNorm), residual from the second on."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for _ in range(depth + 1 if depth else 0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        x = self.norms[0](x)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms[1:])):
            y = norm(F.gelu(layer(x), approximate="tanh"))
            x = x + y if i else y
        return x


class M3AE(MultimodalEncoder):
    """The model and its loss. `forward(batch)` takes a PackedBatch and returns Losses."""

    def __init__(self, config: ModelConfig, loss: LossConfig | None = None) -> None:
        super().__init__(config)
        self.loss_config = loss or LossConfig()
        pixels, drops = pixel_options(config), drop_options(config)
        head_depth, width = config.output_head_depth, config.dec_emb_dim

        self.decoder_input = DecoderInput(config)
        self.decoder = Transformer(width, config.dec_depth, config.dec_num_heads, config.mlp_ratio, **drops)
        self.image_mlp = HeadMLP(width, head_depth)
        self.image_head = MaskedPixelLoss(width, **pixels, norm_pix=self.loss_config.norm_pix)
        self.text_mlp = HeadMLP(width, head_depth) if config.vocab_size else None
        self.text_head = MaskedTokenLoss(width, config.vocab_size) if config.vocab_size else None
        self.reset_parameters()

    @property
    def geometry(self) -> Geometry:
        loss = self.loss_config
        return replace(super().geometry, image_all_tokens=loss.image_all_tokens, text_all_tokens=loss.text_all_tokens)

    def forward_decoder(self, encoded_TD: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden rows of the two heads, [I, E] and [W, E]: only rows that carry loss are finished."""
        x_UE = self.decoder_input(encoded_TD, batch)
        x_ME = self.decoder(x_UE, batch.decoder, batch.loss_rows, batch.loss)
        hidden_IE = self.image_mlp(self.decoder.norm(x_ME, batch.image_rows))
        hidden_WE = self.text_mlp(self.decoder.norm(x_ME, batch.text_rows)) if self.text_mlp else None
        return hidden_IE, hidden_WE

    def forward(self, batch: PackedBatch, counts: LossCounts | None = None) -> Losses:
        """Losses of a packed batch. A modality that the batch lacks has loss 0 and zero gradients.

        Args:
            batch: on the model's device.
            counts: pictures and captions that the losses are means over: of a whole step, per rank, where the batch is
                a part of it. None: those of the batch.
        """
        images, captions = (count or 1.0 for count in counts or batch.counts)
        hidden_IE, hidden_WE = self.forward_decoder(self.forward_encoder(batch), batch)
        image_loss = self.image_head(hidden_IE, batch.images, batch.image_patch_ids, batch.image_row_weight) / images
        text_loss = text_accuracy = torch.zeros_like(image_loss)
        if self.text_head is not None:
            text_sum, correct_W = self.text_head(hidden_WE, batch.text_targets, batch.text_row_weight)
            text_loss = text_sum / captions
            text_accuracy = (correct_W * batch.text_row_weight).sum() / captions
        loss = self.loss_config.image_weight * image_loss + self.loss_config.text_weight * text_loss
        return Losses(loss, image_loss.detach(), text_loss.detach(), text_accuracy)

    @torch.no_grad()
    def predict(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Normalised pixels [I, P*P*C] and logits [W, V] of the rows that carry loss."""
        hidden_IE, hidden_WE = self.forward_decoder(self.forward_encoder(batch), batch)
        return self.image_head.predict(hidden_IE), self.text_head.predict(hidden_WE) if self.text_head else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (the weights as they are) into `folder`."""
        write_pretrained(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> M3AE:
        """Load what `save_pretrained` or `python -m m3ae_fast.export` wrote.

        Raises:
            UserError: a file is missing, damaged or does not fit the other.
        """
        config, state = read_pretrained(folder)
        model = cls(config)
        load_weights(model, state, str(folder))
        return model
