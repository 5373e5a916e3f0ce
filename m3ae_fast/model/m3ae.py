"""M3AE (arXiv 2205.14204): one ViT encoder over visible patches and text tokens, a light decoder, and two losses.

Shapes: T encoder rows, U decoder rows, M rows that carry loss (I patches, W text tokens), D encoder width, E decoder
width.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from m3ae_kernels import MaskedTokenLoss, head_inputs, m3ae_loss, scatter_tokens
from m3ae_kernels.cpu.norm import LayerNorm
from torch import Tensor, nn

from m3ae_fast.base.hub import push_folder
from m3ae_fast.batch.packed import LossCounts, PackedBatch
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model.card import model_card
from m3ae_fast.model.cross_decoder import CrossDecoder
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.image_targets import image_targets
from m3ae_fast.model.positions import Positions
from m3ae_fast.model.pretrained import Pretrained, build, read_pretrained, write_pretrained
from m3ae_fast.model.transformer import EPS, QKV, Gelu, Transformer, gelu


class Losses(NamedTuple):
    """Losses of a batch: 0-d float32 tensors. Only `loss` is differentiable; the other tensors are detached.

    This class is a tuple because DeepSpeed finds differentiable outputs only in tuples, lists and dicts.
    """

    loss: Tensor  # weighted sum of the two losses
    image_loss: Tensor
    text_loss: Tensor
    text_accuracy: Tensor  # fraction, from 0 to 1


class DecoderInput(nn.Module):
    """Maps encoder rows to decoder rows: projection, un-shuffle, mask embeddings, positions and types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dec_emb_dim
        self.proj = nn.Linear(config.emb_dim, dim)
        self.unshuffle = Unshuffle(config, dim)

    def forward(self, encoded_TD: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the encoder's rows at the decoder's width, [T, E], and the decoder's rows, [U, E]."""
        encoded_TE = self.proj(encoded_TD)
        return encoded_TE, self.unshuffle(encoded_TE, batch)


class Unshuffle(nn.Module):
    """Places projected encoder rows and mask embeddings in the order of the decoder, and adds positions and types."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.image_mask = nn.Parameter(torch.empty(1, dim))
        self.text_mask = nn.Parameter(torch.empty(1, dim)) if config.vocab_size else None
        self.image_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding else None
        self.text_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding and config.vocab_size else None
        self.positions = Positions(config, dim)

    def forward(self, x_TE: Tensor, batch: PackedBatch) -> Tensor:
        """Return the decoder's rows, [U, E] in the dtype of `x_TE`."""
        masks = self.image_mask if self.text_mask is None else torch.cat((self.image_mask, self.text_mask))
        table = torch.cat(self.positions(self.image_type, self.text_type, batch.grids))
        return scatter_tokens(
            x_TE, batch.decoder_src, masks, batch.mask_ids, table, batch.decoder_table_ids,
            fill_order=batch.mask_order, table_order=batch.decoder_table_order,
        )  # fmt: skip


class HeadMLP(nn.Module):
    """The hidden layers of an output head: a LayerNorm, then groups of Linear, GELU and LayerNorm, with residual
    connections from the second group on."""

    def __init__(self, dim: int, depth: int, gelu: Gelu) -> None:
        super().__init__()
        self.gelu = gelu
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norms = nn.ModuleList(LayerNorm(dim, eps=EPS) for _ in range(depth + 1 if depth else 0))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]; with depth 0, return `x`."""
        if not self.layers:
            return x
        x = self.norms[0](x)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms[1:])):
            y = norm(gelu(layer(x), self.gelu))
            x = x + y if i else y
        return x


class M3AE(MultimodalEncoder):
    """The M3AE model with its losses. `forward(batch)` maps a PackedBatch to Losses. The weights are initialised as in
    the official code, from torch's generator. The constructor raises ValueError if the loss includes visible tokens
    although the decoder has cross-attention."""

    def __init__(self, config: ModelConfig, loss: LossConfig | None = None) -> None:
        super().__init__(config)
        self.loss_config = loss or LossConfig()
        head_depth, width = config.output_head_depth, config.dec_emb_dim

        self.decoder_input = DecoderInput(config)
        if config.dec_attention == "cross" and (self.loss_config.image_all_tokens or self.loss_config.text_all_tokens):
            raise ValueError(
                "a decoder with cross-attention predicts only masked tokens: image_all_tokens and "
                "text_all_tokens must be False"
            )
        decoder = CrossDecoder if config.dec_attention == "cross" else Transformer
        sizes = width, config.dec_depth, config.dec_num_heads, config.mlp_ratio
        self.decoder: CrossDecoder | Transformer = decoder(
            *sizes, gelu=config.gelu, drop_path=config.drop_path, drop_key=1
        )
        self.image_mlp = HeadMLP(width, head_depth, config.gelu)
        self.image_targets = image_targets(config, self.loss_config)
        self.image_head = self.image_targets.head()
        self.text_mlp = HeadMLP(width, head_depth, config.gelu) if config.vocab_size else None
        self.text_head = MaskedTokenLoss(width, config.vocab_size, reduction="sum") if config.vocab_size else None
        self.reset_parameters()

    def hidden_matrices(self) -> dict[Tensor, int]:
        """Return the weights between hidden layers (in the blocks and in the decoder's input), each with the number of
        matrices that are stacked in it. A weight may contain the matrices of queries, keys and values, or, in a
        cross-attention decoder, those of the keys and values of all blocks."""
        found: dict[Tensor, int] = {self.decoder_input.proj.weight: 1}
        for module in (m for part in (self.encoder, self.decoder) for m in part.blocks.modules()):
            if isinstance(module, nn.Linear):
                found[module.weight] = 3 if isinstance(module, QKV) else 1
        if isinstance(self.decoder, CrossDecoder):
            found[self.decoder.kv.weight] = 2 * len(self.decoder.blocks)
        return found

    def reset_parameters(self) -> None:
        """Initialise all weights; see `MultimodalEncoder.reset_parameters`."""
        super().reset_parameters()
        if isinstance(self.decoder, CrossDecoder):
            self.decoder.reset_keys_and_values()

    @property
    def geometry(self) -> Geometry:
        """Return the properties of the model's input and losses that image decoding and `pack` require."""
        loss = self.loss_config
        return replace(
            super().geometry,
            image_all_tokens=loss.image_all_tokens,
            text_all_tokens=loss.text_all_tokens,
            loss_per_batch=loss.per == "batch",
        )

    def forward_decoder(self, encoded_TD: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Return the hidden rows of the two heads: [I, E] for images and [W, E] for texts; the latter is None if the
        model is image-only. The last block computes only rows that carry loss. `encoded_TD`: the output of
        `forward_encoder`."""
        encoded_TE, x_UE = self.decoder_input(encoded_TD, batch)
        if isinstance(self.decoder, CrossDecoder):  # all rows of this decoder carry loss
            x_ME = self.decoder(x_UE, encoded_TE, batch.encoder, batch.loss, batch.draws)
        else:
            x_ME = self.decoder(x_UE, batch.decoder, batch.draws, batch.loss_rows, batch.loss)
        return head_inputs(
            x_ME,
            norm=self.decoder.norm,
            image_rows=batch.image_rows,
            text_rows=batch.text_rows if self.text_head else None,
            image_mlp=self.image_mlp,
            text_mlp=self.text_mlp,
        )

    def forward(self, batch: PackedBatch, counts: LossCounts | None = None) -> Losses:
        """Return the losses of a packed batch. If the batch lacks a modality, the loss and gradients of this modality
        are 0.

        Args:
            batch: the batch, on the model's device.
            counts: denominators of the losses. If the batch is a part of a step, these are the counts of the whole step
                divided by the number of ranks. None: the counts of the batch.

        Raises:
            TypeError: `batch` is not a packed batch.
        """
        if not isinstance(batch, PackedBatch):
            raise TypeError(
                f"forward returns the losses of a PackedBatch, not of {type(batch).__name__}: for the features of "
                "images, use encode or, with gradients, representation"
            )
        image_terms, text_terms = (count or 1.0 for count in counts or batch.counts)
        sums = m3ae_loss(
            *self.forward_decoder(self.forward_encoder(batch), batch),
            image_head=self.image_head,
            images=batch.images,
            patch_ids=batch.image_patch_ids,
            image_targets=batch.image_targets,
            image_row_weight=batch.image_row_weight,
            text_head=self.text_head,
            targets=batch.text_targets,
            text_row_weight=batch.text_row_weight,
            correct_weight=batch.text_row_mean_weight,
        )
        image_loss = sums.image / image_terms
        text_loss, text_accuracy = sums.text / text_terms, sums.correct / text_terms
        loss = self.loss_config.image_weight * image_loss + self.loss_config.text_weight * text_loss
        return Losses(loss, image_loss.detach(), text_loss.detach(), text_accuracy)

    @torch.no_grad()
    def predict(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Return predictions for the rows that carry loss, as a pair. The first part is for images. It depends on
        `model.image_targets`: normalised pixels [I, P*P*C] (standardised per patch with `norm_pix`), HOG [I, 9],
        features of a teacher [I, K], or logits over the VQGAN's codebook [I, codebook]. The second part is for texts:
        logits [W, V], or None if the model is image-only."""
        hidden_IE, hidden_WE = self.forward_decoder(self.forward_encoder(batch), batch)
        logits_WV = None if self.text_head is None or hidden_WE is None else self.text_head.predict(hidden_WE)
        return self.image_head.predict(hidden_IE), logits_WV

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights (in their dtype), config, tokenizer and a model card to `folder`, atomically.

        Raises:
            UserError: the folder holds other files, or cannot be written.
        """
        card = model_card(Path(folder).resolve().name, self.config)
        found = Pretrained(self.config, self.state_dict(), self.tokenizer, self.loss_config.norm_pix)
        write_pretrained(folder, found, card)

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Upload the files of `save_pretrained` to the Hugging Face Hub as `name` (owner/name), and return the address.

        Raises:
            UserError: the user is not logged in, or the Hub refuses the request or does not respond.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, name.rpartition("/")[2])
            self.save_pretrained(folder)
            return push_folder(folder, name, private)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> M3AE:
        """Load a model written by `save_pretrained` or `m3ae-fast convert`, from a folder or from the Hugging Face Hub
        by its name (owner/name).

        The `tokenizer` is loaded too if there is one, and so is `loss.norm_pix`; the other settings of the loss have
        their default values. If the source contains only an encoder, a warning is issued, and the decoder is randomly
        initialised.

        Raises:
            UserError: a file is missing or damaged, the files do not fit together, or the Hub does not respond.
        """
        found = read_pretrained(source)
        loss = LossConfig(norm_pix=bool(found.norm_pix))
        model = build(lambda: cls(found.config, loss), found.state, str(source))
        if not found.has_decoder:
            warnings.warn(f"{source} contains only an encoder: the decoder is randomly initialised", stacklevel=2)
        model.tokenizer = found.tokenizer
        return model
